"""The checkpointer: what is saved when, and what a resumed run finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from movq_cli import runs
from movq_cli.console import Console
from movq_cli.ranks import Ranks
from movq_cli.run_manifest import RunManifest
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training.checkpointer import Checkpointer
from tests.training.toy import ToyStage

QUIET = Console(quiet=True)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", "vq")


def start(run: Run, tiny: Preset, steps: int = 10) -> RunManifest:
    return runs.start_or_resume(
        run, runs.new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=steps, data="d")
    )


def test_a_resumed_run_has_the_weights_the_step_and_the_best_score(run: Run, tiny: Preset) -> None:
    stage = ToyStage(tiny.train_vq)
    checkpointer = Checkpointer(stage, run, start(run, tiny))
    assert checkpointer.resume(QUIET) == 0
    stage.model.weight.data.fill_(3)
    checkpointer.save_best(2, {"psnr": 5.0})
    checkpointer.save(4)

    resumed = ToyStage(tiny.train_vq)
    second = Checkpointer(resumed, run, start(run, tiny))
    assert second.resume(QUIET) == 4
    assert torch.equal(resumed.model.weight, torch.full((1, 1), 3.0))
    assert (second.manifest.best_step, second.manifest.best_score) == (2, 5.0)


def test_only_a_higher_score_replaces_the_best_weights(run: Run, tiny: Preset) -> None:
    stage = ToyStage(tiny.train_vq)
    checkpointer = Checkpointer(stage, run, start(run, tiny))
    best = []
    for step, score in enumerate([1.0, 0.5, 1.0, 2.0, -3.0]):
        stage.model.weight.data.fill_(step)
        checkpointer.save_best(step, {"psnr": score})
        checkpointer.save(step)
        best.append(float(run.best.read_text()))
    assert best == [0, 0, 0, 3, 3]
    assert checkpointer.manifest.best_step == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_does_not_replace_the_checkpoint(run: Run, tiny: Preset, value: float) -> None:
    stage = ToyStage(tiny.train_vq)
    checkpointer = Checkpointer(stage, run, start(run, tiny))
    checkpointer.save(1)
    before = run.checkpoint.read_bytes()
    stage.model.weight.data.fill_(value)
    assert not checkpointer.save_if_finite(2)
    assert run.checkpoint.read_bytes() == before
    stage.model.weight.data.fill_(1)
    assert checkpointer.save_if_finite(2)
    assert run.read().step == 2


def test_the_manifest_says_when_the_run_is_finished(run: Run, tiny: Preset) -> None:
    checkpointer = Checkpointer(ToyStage(tiny.train_vq), run, start(run, tiny))
    checkpointer.save(9)
    manifest = run.read()
    assert (manifest.status, manifest.step, manifest.finished) == ("running", 9, None)
    checkpointer.save(10)
    manifest = run.read()
    assert (manifest.status, manifest.step) == ("finished", 10)
    assert manifest.finished is not None


def test_ranks_other_than_the_first_write_no_file(run: Run, tiny: Preset) -> None:
    manifest = start(run, tiny)
    before = sorted(path.name for path in run.folder.iterdir())
    checkpointer = Checkpointer(ToyStage(tiny.train_vq, Ranks(1, 2)), run, manifest)
    checkpointer.save(3)
    checkpointer.save_best(3, {"psnr": 1.0})
    assert checkpointer.save_if_finite(4)
    checkpointer.publish(10)
    assert sorted(path.name for path in run.folder.iterdir()) == before
