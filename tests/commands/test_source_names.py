"""The user's own file names for the reconstructions of a prepared set."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from movq_cli.data.shard_index import read_index
from movq_cli.errors import BadRequestError
from movq_cli.sources.original_names import original_names
from tests.conftest import Movq


@pytest.mark.slow
def test_reconstructions_of_a_prepared_set_have_the_names_of_the_users_files(movq: Movq, trained: Path) -> None:
    movq("reconstruct", "data", "back", "--codes", "codes", "--source-names")
    originals = {path.relative_to(trained / "pictures") for path in (trained / "pictures").rglob("*.png")}
    for folder, suffix in (("back", ".png"), ("codes", ".npy")):
        written = {path.relative_to(trained / folder) for path in (trained / folder).rglob(f"*{suffix}")}
        assert written == {path.with_suffix(suffix) for path in originals}
    # Each image has the name of its own original.
    stored = trained / "stored"
    movq("reconstruct", "data", "stored")
    named = {path.read_bytes() for path in (trained / "back").rglob("*.png")}
    assert named == {path.read_bytes() for path in stored.rglob("*.png")}
    measured = json.loads(movq("evaluate", "--psnr", "pictures", "back", "--crop", "16", "--json").stdout)
    assert measured["psnr"] > 9
    refused = movq("reconstruct", "pictures", "x", "--source-names", code=2).stderr
    assert "pictures is not a prepared set, so that --source-names has no effect" in refused


def rename(monkeypatch: pytest.MonkeyPatch, sources: Mapping[str, object]) -> None:
    """Let the shards say other names of their sources, as those of a set that somebody else made could."""

    def index(archive: zipfile.ZipFile) -> dict[str, Any]:
        content = read_index(archive)
        return {**content, "sources": {**content["sources"], **sources}}

    monkeypatch.setattr("movq_cli.data.shard_index.read_index", index)


@pytest.mark.parametrize(
    "source", ["/etc/passwd", "../up.png", "a/../../b.png", "x" * 300 + ".png", "a\0.png", "\ud800.png", ""]
)
def test_a_name_that_leads_elsewhere_is_refused(
    prepared: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    rename(monkeypatch, {"00000/img00000003.png": source})
    with pytest.raises(BadRequestError, match=r"not the name of a file below a folder\. Omit --source-names"):
        original_names(tmp_path / "data", ["val/00000/img00000003.png"])


def test_images_of_one_name_have_their_name_in_the_set_before_it(
    prepared: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = ["00000/img00000003.png", "00000/img00000004.png", "00000/img00000005.png"]
    rename(monkeypatch, {members[0]: "same.jpg", members[1]: "same.jpg", members[2]: "other.jpg"})
    assert original_names(tmp_path / "data", [f"val/{member}" for member in members]) == (
        "val/00000/img00000003/same.jpg",
        "val/00000/img00000004/same.jpg",
        "other.jpg",
    )


def test_sources_that_are_not_names_are_those_of_a_damaged_shard(
    prepared: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename(monkeypatch, {"00000/img00000003.png": 3})
    with pytest.raises(BadRequestError, match=r"shard .*00000\.zip is damaged \(its sources are not names\)"):
        original_names(tmp_path / "data", ["val/00000/img00000003.png"])
