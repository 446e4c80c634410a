"""The recipes of docs/extending.md for a setting with its option and for a preset, performed on the real commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from movq_cli import presets

if TYPE_CHECKING:
    from tests.conftest import Movq

SOURCE = Path(__file__).parents[1]

TOY_FIELD = """
    sharpness: Annotated[float, Field(gt=0, le=9)] | None = Field(
        None, description="strength of the toy effect; null = no effect"
    )
    flavour: Literal["plain", "sweet"] = Field("plain", description="flavour of the toy effect")
    is_toy: bool = Field(False, description="use the toy effect")
"""


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the program to whose SampleSettings one contributor has added three fields, and nothing else."""
    for folder in ("movq_cli", "presets"):
        shutil.copytree(SOURCE / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "movq_cli" / "settings.py"
    class_line = '    """The settings of sampling from a prior.'
    before, marker, after = path.read_text().partition(class_line)
    docstring, newline, fields = after.partition("\n")
    path.write_text(before + marker + docstring + newline + TOY_FIELD + fields)
    return tmp_path


def run(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "movq_cli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
def test_a_new_field_of_the_sample_settings_is_an_option_a_setting_and_a_comment(extended: Path) -> None:
    text = " ".join(run(extended, "sample", "--help").stdout.split())
    assert "--sharpness <float> Strength of the toy effect (above 0 and at most 9)." in text
    assert "[default: the preset's value, or no effect]" in text
    assert "--flavour plain|sweet Flavour of the toy effect. [default: the preset's value, or plain]" in text
    assert "--is-toy" in text
    assert "--no-is-toy" in text
    shown = run(extended, "presets", "show", "digits", "-o", "sample.sharpness=2.5").stdout
    assert "sharpness: 2.5  # strength of the toy effect; null = no effect" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sharpness", "0"], ["--sharpness", "greater than 0"]),
        (["--sharpness", "10"], ["--sharpness", "9", "10"]),
        (["--flavour", "sour"], ["--flavour", "'plain' or 'sweet'", "'sour'"]),
    ],
)
def test_the_bounds_and_choices_of_the_new_field_hold_for_its_option(
    extended: Path, arguments: list[str], words: list[str]
) -> None:
    errors = run(extended, "sample", "out", *arguments, code=2).stderr
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: ")
    assert all(word in errors for word in words)


def test_the_command_records_the_value_of_the_new_option(extended: Path, trained_once: Path) -> None:
    prior = str(trained_once / "runs" / "tiny-prior")
    arguments = ["-n", "1", "--run", prior, "--device", "cpu", "--quiet"]
    run(extended, "sample", "out", *arguments, "--sharpness", "3", "--no-is-toy")
    settings = json.loads((extended / "out" / "manifest.json").read_text())["settings"]
    assert (settings["sharpness"], settings["flavour"], settings["is_toy"]) == (3.0, "plain", False)


def test_a_preset_is_one_file_that_the_commands_find_by_name(movq: Movq, tmp_path: Path) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "toy.yaml").write_text(
        "# A small tokenizer with fewer codes.\nbase: digits\ndescription: the toy preset\nvq:\n  codebook_size: 64\n"
    )
    assert json.loads(movq("presets", "--json").stdout)["toy"]["description"] == "the toy preset"
    shown = json.loads(movq("presets", "show", "toy", "--json").stdout)
    digits = presets.load("digits").model_dump(mode="json")
    assert shown == {**digits, "description": "the toy preset", "vq": {**digits["vq"], "codebook_size": 64}}
    plan = json.loads(movq("train-vq", "--preset", "toy", "--dry-run", "--json").stdout)
    original = json.loads(movq("train-vq", "--preset", "digits", "--dry-run", "--json").stdout)
    assert original["parameters"]["quantizer"] == 4 * plan["parameters"]["quantizer"]
