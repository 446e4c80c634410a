"""Guidance with a prior that never saw an image without its class has no useful effect, and the user is warned."""

from __future__ import annotations

from pathlib import Path

import pytest

from movq_cli.commands.sample import _warn_of_guidance
from movq_cli.console import Console
from movq_cli.run_manifest import RunManifest
from movq_cli.runs import Run
from movq_cli.settings import Preset, SampleSettings


@pytest.mark.parametrize(("dropout", "guidance", "warns"), [(0.0, 1.0, True), (0.0, 0.0, False), (0.1, 1.0, False)])
def test_guidance_without_label_dropout_is_warned_of(
    dropout: float, guidance: float, warns: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, "prior")
    settings = Preset.model_validate({"prior": {"classes": 3}, "train_prior": {"label_dropout": dropout}})
    run.write(RunManifest(kind="prior", preset="p", steps=1, started="", data=None, settings=settings))
    _warn_of_guidance(SampleSettings(guidance=guidance), tmp_path / "weights.safetensors", Console())
    assert ("without label dropout" in capsys.readouterr().err) == warns


def test_a_damaged_manifest_beside_the_weights_does_not_end_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{")
    _warn_of_guidance(SampleSettings(guidance=1.0), tmp_path / "weights.safetensors", Console())
    assert capsys.readouterr().err == ""
