"""A file to write has the suffix of its content, and movq replaces only files that movq wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from movq_cli.data.output_files import STATISTICS, refuse_foreign
from movq_cli.evaluation.feature_cache import write_reference
from tests.commands.test_report import VQ
from tests.test_unused_options import refusal

if TYPE_CHECKING:
    from movq_cli.data.shards import PreparedSet
    from tests.conftest import Movq


@pytest.mark.parametrize(
    ("arguments", "option", "suffix"),
    [
        (["reconstruct", "absent", "out", "--grid"], "--grid", ".png"),
        (["reconstruct", "absent", "out", "--mask-ratio", "0.5", "--figure"], "--figure", ".png"),
        (["sample", "out", "--grid"], "--grid", ".png"),
        (["evaluate", "absent", "absent", "--copies"], "--copies", ".png"),
        (["evaluate", "absent", "absent", "--out"], "--out", ".json"),
        (["evaluate", "--table", "absent.json", "--out"], "--out", ".json"),
        (["prepare", "--show", "absent"], "OUT", ".png"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jpg", "a", "folder/a.b.md", ""])
def test_a_name_of_another_content_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], option: str, suffix: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(*arguments, name)
    path = Path(name)
    assert message == (
        f"{option} {path} is not the name of a {suffix} file. Example: {option} {path.stem or 'file'}{suffix}"
    )
    assert not list(tmp_path.iterdir())


def test_the_suffix_counts_after_variables_and_in_capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PICTURE", "a.PNG")
    assert "absent" in refusal("reconstruct", "absent", "out", "--grid=$PICTURE")


def photo(path: Path) -> bytes:
    """Write a picture as a user has one, and return its bytes."""
    Image.fromarray(np.full((9, 9, 3), 77, np.uint8)).save(path)
    return path.read_bytes()


def refuses(folder: Path, movq: Movq, *arguments: str, out: str) -> None:
    """Check that a command does not replace a file of the user, does what it advises, and replaces its own file."""
    path = folder / out
    before = path.read_bytes()
    assert f"error: {out} exists, and movq did not write it. Choose another path, or remove that file." in (
        movq(*arguments, code=2).stderr
    )
    assert path.read_bytes() == before
    path.unlink()
    for _ in range(2):
        movq(*arguments)
    assert path.read_bytes() != before
    path.write_bytes(b"")  # Nothing is lost.
    movq(*arguments)
    assert path.stat().st_size > 0
    path.unlink()


def test_a_contact_sheet_replaces_only_contact_sheets(prepared: PreparedSet, movq: Movq, tmp_path: Path) -> None:
    photo(tmp_path / "sheet.png")
    refuses(tmp_path, movq, "prepare", "--show", "data", "sheet.png", out="sheet.png")
    before = photo(tmp_path / "data.png")
    assert "data.png exists, and movq did not write it" in movq("prepare", "--show", prepared.root, code=2).stderr
    assert (tmp_path / "data.png").read_bytes() == before
    (tmp_path / "data.png").write_bytes(b"no picture")
    assert "data.png exists, and movq did not write it" in movq("prepare", "--show", prepared.root, code=2).stderr


@pytest.mark.slow
def test_pictures_of_the_commands_replace_only_pictures_of_movq(movq: Movq, trained: Path) -> None:
    for arguments in (
        ["reconstruct", "data", "back", "--split", "val", "--grid"],
        ["reconstruct", "pictures/bar", "filled", "--mask-ratio", "0.5", "--figure"],
        ["sample", "samples", "-n", "2", "--grid"],
    ):
        photo(trained / "own.png")
        refuses(trained, movq, *arguments, "own.png", out="own.png")
        (trained / "own.png").mkdir()
        assert "own.png is a folder" in movq(*arguments, "own.png", code=2).stderr
        (trained / "own.png").rmdir()
    before = photo(trained / "own.png")
    said = movq("evaluate", "data", "back", "--psnr", "--copies", "own.png", code=2).stderr
    assert "own.png exists, and movq did not write it" in said and (trained / "own.png").read_bytes() == before


def test_a_page_replaces_only_pages_of_movq(movq: Movq, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<title>My notes</title>")
    refuses(tmp_path, movq, "report", str(VQ), "page.html", "--no-models", out="page.html")


def test_results_and_statistics_replace_only_those_of_movq(movq: Movq, shapes: Path, tmp_path: Path) -> None:
    measure = ["evaluate", str(shapes), str(shapes), "--psnr", "--out", "result.json"]
    for own in ('{"lr": 0.1}', "[1, 2]", "notes", '{"a": {"protocol": {}}, "b": 1}'):
        (tmp_path / "result.json").write_text(own)
        assert "result.json exists, and movq did not write it" in movq(*measure, code=2).stderr
        assert (tmp_path / "result.json").read_text() == own
    (tmp_path / "result.json").unlink()
    for _ in range(2):
        movq(*measure)
    table = ["evaluate", "--table", "result.json", "--out"]
    for _ in range(2):
        movq(*table, "all.json")
    (tmp_path / "own.json").write_text(json.dumps({"a": 1}))
    assert "own.json exists, and movq did not write it" in movq(*table, "own.json", code=2).stderr
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    before = (tmp_path / "stats.npz").read_bytes()
    said = movq("evaluate", shapes, "--stats", "stats.npz", code=2).stderr
    assert "stats.npz exists, and movq did not write it" in said
    assert (tmp_path / "stats.npz").read_bytes() == before
    write_reference(tmp_path / "stats.npz", torch.zeros(3), torch.zeros(3, 3), {"extractor": "x"})
    refuse_foreign(tmp_path / "stats.npz", STATISTICS)
