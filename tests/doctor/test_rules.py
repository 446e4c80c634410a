"""Each rule fires on a real training that was made ill on purpose, and every rule is silent on healthy ones.

`record.py` made the logs; each of the ill ones is named after the rule that has to find what is wrong.
"""

from __future__ import annotations

import json
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movq_cli import presets
from movq_cli.app import app
from movq_cli.data.images import encode_png
from movq_cli.doctor.examination import examine
from movq_cli.doctor.rules import RULES
from movq_cli.run_history import RunHistory
from tests.conftest import edit_header
from tests.doctor.record import PRIORS, RUNS, TOKENIZERS
from tests.test_documents import parse

RECORDED = sorted([*TOKENIZERS, *PRIORS])
ILL = [name for name in RECORDED if not name.startswith("healthy")]
HEALTHY = [name for name in RECORDED if name.startswith("healthy")]
MADE_ILL_BELOW = {"checkerboard", "wrong-tokenizer"}
"""Rules whose ill runs are made by the tests themselves."""


def rules_of(folder: Path) -> list[str]:
    return [finding.rule for finding in examine(RunHistory.read(folder))]


@pytest.mark.parametrize("name", ILL)
def test_a_run_that_was_made_ill_is_found(name: str) -> None:
    assert name in rules_of(RUNS / name)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_findings(name: str) -> None:
    assert rules_of(RUNS / name) == []


def test_there_is_an_ill_run_for_every_rule() -> None:
    assert {rule.key for rule in RULES} == set(ILL) | MADE_ILL_BELOW


def test_every_rule_is_documented_and_gives_its_reason() -> None:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    assert [rule.key for rule in RULES if f"| `{rule.key}` | {rule.title}. {rule.why} |" not in text] == []


@pytest.mark.parametrize("name", ILL)
def test_a_finding_has_its_numbers_and_a_step_and_a_command_that_trains(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy is read as the command reads it; that of one run is performed as far as the plan of its training."""
    run = tmp_path / "a run"
    shutil.copytree(RUNS / name, run)
    settings = json.loads((run / "run.json").read_text())["settings"]
    (run / "settings.yaml").write_text(json.dumps(settings))
    (finding,) = [finding for finding in examine(RunHistory.read(run)) if finding.rule == name]
    assert any(character.isdigit() for character in finding.evidence) and finding.step > 0
    words = shlex.split(finding.remedy)
    assert words[0] == "movq"
    if words[1] == "prepare":
        return
    parse(shlex.join(words[1:]))
    overrides = [word for option, word in pairwise(words) if option == "-o"]
    presets.load(words[words.index("--preset") + 1], overrides)
    if name == "discriminator-never-starts":
        app([*words[1:], "--dry-run", "--device", "cpu"], standalone_mode=False)
        assert "memory_gib" in capsys.readouterr().out


@pytest.mark.parametrize("length", [0, 1, 2, 5])
@pytest.mark.parametrize("name", [*HEALTHY, "learning-rate-too-high"])
def test_the_beginning_of_a_training_has_no_findings(name: str, length: int, tmp_path: Path) -> None:
    """The first lines of every training look ill."""
    shutil.copytree(RUNS / name, tmp_path / "run")
    lines = (RUNS / name / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "log.jsonl").write_text("".join(lines[:length]))
    shutil.rmtree(tmp_path / "run" / "pictures", ignore_errors=True)
    assert rules_of(tmp_path / "run") == []


@pytest.mark.parametrize("metric", ["lpips", "rfid"])
@pytest.mark.parametrize(("last", "is_found"), [(0.3, False), (0.6, True)])
def test_a_discriminator_that_always_wins_is_too_strong_only_if_no_metric_gains(
    metric: str, last: float, tmp_path: Path, *, is_found: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(RUNS / "discriminator-too-strong", run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if "discriminator_start" in line.get("session", line):
            line.get("session", line)["discriminator_start"] = 50
        if "validation" in line:
            line["validation"][metric] = last if line["step"] > 100 else 0.5
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ("discriminator-too-strong" in rules_of(run)) == is_found


@pytest.mark.parametrize(("period", "amplitude", "is_found"), [(2, 6, True), (4, 16, True), (2, 0, False)])
def test_a_checkerboard_in_the_reconstructions_is_found(
    tmp_path: Path, period: int, amplitude: int, is_found: bool
) -> None:
    """The decoder has no transposed convolutions, so that no short training makes one: it is drawn into a real run."""
    run = tmp_path / "run"
    shutil.copytree(RUNS / "healthy-tokenizer", run)
    path = sorted((run / "pictures").iterdir())[-1]
    with Image.open(path) as picture:
        text, pixels = picture.info["movq"], np.asarray(picture).astype(np.int16)
    grid = json.loads(text)["grid"]
    x = (np.arange(pixels.shape[1]) - grid["left"]) // grid["scale"] - 2
    # The images begin every width + 2 pixels, which is a multiple of both periods.
    pattern = amplitude * np.sign(np.cos(2 * np.pi * (x + 0.5 * (period == 4)) / period))
    top = grid["top"] + (grid["height"] + 4) * grid["scale"]
    rows = slice(top, top + grid["height"] * grid["scale"])
    pixels[rows] += pattern.astype(np.int16)[None, :, None]
    path.write_bytes(encode_png(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), text=text))
    assert ("checkerboard" in rules_of(run)) == is_found


def test_a_tokenizer_that_was_exchanged_is_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(RUNS / "healthy-prior", run)
    (run / "tokenizer.safetensors").write_bytes(b"another tokenizer")
    assert rules_of(run) == ["wrong-tokenizer"]


def test_a_step_that_was_not_finite_is_a_learning_rate_that_is_too_high(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(RUNS / "healthy-tokenizer", run)
    (run / "nonfinite.json").write_text("{}")
    edit_header(run / "run.json", status="running", finished=None)
    assert rules_of(run) == ["learning-rate-too-high"]


def test_a_damaged_picture_costs_no_examination(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(RUNS / "healthy-tokenizer", run)
    sorted((run / "pictures").iterdir())[-1].write_bytes(b"\x89PNG half")
    assert rules_of(run) == []
