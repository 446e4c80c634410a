"""`movq weights` tells what is here and what is not, and can fetch nothing without a network."""

from __future__ import annotations

import json
from pathlib import Path

from movq_cli.evaluation.pretrained import WEIGHTS
from tests.conftest import Movq

CLOSED = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}


def test_it_lists_each_file_with_its_place_and_whether_it_is_the_published_one(movq: Movq, tmp_path: Path) -> None:
    folder = tmp_path / "carried"
    folder.mkdir()
    (folder / WEIGHTS["alex"].file).write_bytes(b"something else")
    result = json.loads(movq("weights", "--weights", folder, "--json").stdout)
    assert result["searched"] == [str(folder), str(tmp_path / "torch" / "hub" / "checkpoints")]
    assert set(result["weights"]) == {"inception", "vgg", "alex"}
    assert result["weights"]["inception"]["path"] is None
    assert result["weights"]["alex"]["path"] == str(folder / WEIGHTS["alex"].file)
    assert result["weights"]["alex"]["published"] is False
    assert len(result["weights"]["alex"]["sha256"]) == 64
    lines = movq("weights", "--weights", folder).stdout.splitlines()
    assert len(lines) == 4
    assert sum("missing" in line for line in lines) == 2
    assert sum("not the published file" in line for line in lines) == 1


def test_what_cannot_be_fetched_is_a_failure_that_names_its_source(movq: Movq, tmp_path: Path) -> None:
    done = movq("weights", "--fetch", "--weights", tmp_path / "new", code=1, **CLOSED)
    assert "error: cannot download" in done.stderr
    assert WEIGHTS["inception"].url in done.stderr
    assert done.stdout == ""


def test_a_folder_that_is_not_there_is_a_bad_request(movq: Movq, tmp_path: Path) -> None:
    assert "no folder of weights" in movq("weights", "--weights", tmp_path / "nowhere", code=2).stderr
