"""`movq doctor` ends with exit code 3 if it has found something, and with 0 if the run is healthy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from movq_cli.app import app
from movq_cli.errors import BadRequestError
from tests.doctor.record import RUNS


def doctor(*arguments: str | Path) -> int:
    result = app(["doctor", *map(str, arguments)], standalone_mode=False)
    return int(result or 0)


def test_findings_are_exit_code_3_with_evidence_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(RUNS / "colors-lost") == 3
    output = capsys.readouterr().out
    assert "(colors-lost)" in output and "evidence: At step 240" in output and "remedy: movq train-vq" in output


def test_a_healthy_run_is_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(RUNS / "healthy-prior") == 0
    assert "no findings" in capsys.readouterr().out


def test_the_result_as_json_has_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(RUNS / "discriminator-never-starts", "--json") == 3
    result = json.loads(capsys.readouterr().out)
    (finding,) = result["findings"]
    assert finding["rule"] == "discriminator-never-starts" and result["rules"] > 10
    assert set(finding) == {"rule", "title", "evidence", "remedy", "step", "picture"}


def test_a_folder_without_a_run_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="is not a run folder"):
        doctor(tmp_path)
