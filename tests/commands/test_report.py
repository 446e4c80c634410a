"""`movq report` writes where it is told, and says what is wrong with its arguments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from movq_cli.app import app
from movq_cli.errors import BadRequestError
from movq_cli.report import library
from tests.doctor.record import RUNS

VQ, PRIOR = RUNS / "healthy-tokenizer", RUNS / "healthy-prior"


@pytest.fixture(autouse=True)
def _short_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "javascript", lambda: "")


def report(*arguments: str | Path) -> None:
    app(["report", *map(str, arguments)], standalone_mode=False)


def test_the_page_of_one_run_goes_into_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(PRIOR, tmp_path / "run")
    report(tmp_path / "run", "--no-models", "--json")
    result = json.loads(capsys.readouterr().out)
    path = tmp_path / "run" / "report.html"
    assert result == {"path": str(path), "runs": [str(tmp_path / "run")], "bytes": path.stat().st_size}


def test_a_comparison_goes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(VQ, PRIOR, tmp_path / "new" / "both.html")
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'both.html'}\n"
    assert "2 runs: healthy-tokenizer, healthy-prior" in (tmp_path / "new" / "both.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([VQ, PRIOR], r"needs a name\. Name it last: movq report .* compared\.html"),
        (["out.html"], r"no run is named\. Name one: movq report RUN out\.html"),
        ([RUNS, "out.html"], "is not a run folder"),
        ([VQ, PRIOR, "o.html", "--device", "cpu"], "--device has no effect"),
        ([VQ, PRIOR, "o.html", "--no-models"], "--models has no effect"),
        ([VQ, "o.html", "--no-models", "--device", "cpu"], "--device has no effect"),
    ],
)
def test_wrong_arguments_are_one_line_that_says_what_to_do(
    arguments: list[str | Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequestError, match=message):
        report(*arguments)
    assert list(tmp_path.iterdir()) == []
