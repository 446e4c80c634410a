"""What a training shows of itself: each finding is one warning, and nothing that fails there ends the training."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from movq_cli.console import Console
from movq_cli.doctor import examination, rules
from movq_cli.errors import BadRequestError
from movq_cli.report import library
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training.monitor import Monitor, wants_report
from tests.doctor.record import RUNS


@pytest.fixture
def run(tmp_path: Path) -> Run:
    shutil.copytree(RUNS / "colors-lost", tmp_path / "run")
    return Run(tmp_path / "run", "vq")


def monitor(run: Run, tiny: Preset, *, is_first: bool = True) -> Monitor:
    return Monitor(run, tiny.train_vq, Console(), is_first=is_first)


def test_a_finding_is_one_warning_however_often_the_run_is_observed(
    run: Run, tiny: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    observed = monitor(run, tiny)
    observed.observe(is_last=False)
    observed.observe(is_last=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: Colors or brightness are lost. At step 240 ") and "Remedy: movq train-vq" in line


def test_other_ranks_do_nothing(run: Run, tiny: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    monitor(run, tiny, is_first=False).observe(is_last=True)
    assert capsys.readouterr().err == ""


def test_a_rule_that_fails_costs_one_warning(
    run: Run, tiny: Preset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError("no such number")

    broken = dataclasses.replace(rules.RULES[0], check=fail)
    monkeypatch.setattr(examination, "RULES", (broken,))
    observed = monitor(run, tiny)
    for _ in range(3):
        observed.observe(is_last=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert "the training goes on: no such number" in line


def test_a_page_that_cannot_be_written_costs_a_warning(
    run: Run, tiny: Preset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "javascript", lambda: "")
    observed = monitor(run, tiny)
    observed.writes_page = True
    (run.folder / "report.html").mkdir()
    observed.observe(is_last=True)
    assert "the training goes on: " in capsys.readouterr().err
    (run.folder / "report.html").rmdir()
    observed.observe(is_last=False)
    assert "Diagnosis" in (run.folder / "report.html").read_text()


def test_pages_take_a_small_share_of_the_time_of_a_training(
    run: Run, tiny: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "javascript", lambda: "")
    observed, path = monitor(run, tiny), run.folder / "report.html"
    observed.writes_page = True
    observed.observe(is_last=False)
    path.unlink()
    observed.observe(is_last=False)
    assert not path.exists()
    observed.observe(is_last=True)
    assert path.exists()


def test_the_setting_report_is_refused_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "is_installed", lambda: False)
    assert wants_report(None) is wants_report(False) is False
    with pytest.raises(BadRequestError, match=r"pip install 'movq\[report\]'"):
        wants_report(True)
