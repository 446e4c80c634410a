"""Results side by side: the figures of each file, the published rows once, and what keeps them from being compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from movq_cli.commands.evaluation_table import tabulate
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from tests.conftest import Movq


def write(path: Path, protocol: dict[str, Any] | None = None, **figures: float | None) -> Path:
    base: dict[str, Any] = {"real": {"images": 3, "split": None}, "fake": {"images": 1000}, "weights": {}}
    path.write_text(json.dumps({**figures, "protocol": base | (protocol or {})}))
    return path


def test_figures_stand_in_columns_a_row_for_each_file_and_published_row(movq: Movq, tmp_path: Path) -> None:
    published = {"preset": "ffhq", "source": "Table 2", "fid": 8.78}
    a = write(tmp_path / "ours.json", {"published": published}, fid=9.1234, precision=0.61239)
    b = write(tmp_path / "more.json", {"published": published}, fid=7.0, psnr=None)
    done = movq("evaluate", "--table", a, b)
    assert done.stdout.splitlines() == [
        "| | images | fid | precision | psnr |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| ours | 1,000 | 9.12 | 0.6124 | - |",
        "| ffhq, Table 2 | - | 8.78 | - | - |",
        "| more | 1,000 | 7.00 | - | inf |",
    ]
    assert done.stderr == ""
    assert json.loads(movq("evaluate", "--table", a, b, "--json").stdout)[str(a)]["fid"] == 9.1234


def test_a_preset_of_which_nothing_is_published_has_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = write(tmp_path / "ours.json", {"published": {"preset": "ffhq-1ch", "mode": "mask", "source": ""}}, fid=9.0)
    tabulate([str(result)], Console())
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]] == ["ours"]


def test_conditions_that_differ_are_reported(movq: Movq, tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", fid=1.0)
    b = write(tmp_path / "b.json", {"fake": {"images": 999}, "weights": {"inception": {"sha256": "0"}}}, fid=2.0)
    said = movq("evaluate", "--table", a, b).stderr
    assert f"these results differ in the number of fake images: {a}; {b}" in said
    assert "these results differ in the networks' weights" in said
    assert "crop" not in said


def test_one_run_writes_the_table_and_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, out = write(tmp_path / "a.json", fid=1.0), tmp_path / "new" / "all.json"
    tabulate([str(a)], Console(quiet=True), out)
    assert capsys.readouterr().out.startswith("| | images | fid |")
    assert json.loads(out.read_text())[str(a)]["fid"] == 1.0
    before = a.read_bytes()
    for wrong in (a, tmp_path / "." / "a.json", tmp_path):
        with pytest.raises(BadRequestError, match="--out names the JSON file to write"):
            tabulate([str(a)], Console(quiet=True), wrong)
    assert a.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"protocol": 3}'])
def test_other_files_are_refused(movq: Movq, tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    assert "x.json is not a result of `movq evaluate`" in movq("evaluate", "--table", "x.json", code=2).stderr
