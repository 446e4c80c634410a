"""The best weights are never of a later step than the checkpoint from which the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from movq_cli import checkpoints
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training.checkpointer import Checkpointer
from tests.training.test_checkpointer import QUIET, start
from tests.training.toy import ToyStage


class KilledError(BaseException):
    """Stands for the end of the process at a moment."""


@pytest.mark.parametrize("moment", ["before the checkpoint", "after the checkpoint"])
def test_after_a_kill_they_are_those_that_the_checkpoint_knows(
    tmp_path: Path, tiny: Preset, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", "vq")
    stage = ToyStage(tiny.train_vq)
    checkpointer = Checkpointer(stage, run, start(run, tiny))
    for step in (1, 2, 3):  # Two better validations before a checkpoint.
        stage.model.weight.data.fill_(step)
        checkpointer.save_best(step, {"psnr": float(step)})
    checkpointer.save(4)
    assert float(run.best.read_text()) == 3
    stage.model.weight.data.fill_(6)
    checkpointer.save_best(6, {"psnr": 6.0})
    assert float(run.best.read_text()) == 3
    if moment == "after the checkpoint":
        save = checkpoints.save_state

        def killed(*arguments: object) -> None:
            save(*arguments)  # type: ignore[arg-type]
            raise KilledError

        monkeypatch.setattr(checkpoints, "save_state", killed)
        with pytest.raises(KilledError):
            checkpointer.save(6)
    resumed = Checkpointer(ToyStage(tiny.train_vq), run, start(run, tiny))
    assert resumed.resume(QUIET) == (4 if moment == "before the checkpoint" else 6)
    assert float(run.best.read_text()) == resumed.manifest.best_step == (3 if moment == "before the checkpoint" else 6)
    assert list(run.folder.glob("*.next")) == []


def test_a_run_killed_before_its_first_checkpoint_leaves_no_weights_of_it(tmp_path: Path, tiny: Preset) -> None:
    run = Run(tmp_path / "run", "vq")
    Checkpointer(ToyStage(tiny.train_vq), run, start(run, tiny)).save_best(1, {"psnr": 1.0})
    assert Checkpointer(ToyStage(tiny.train_vq), run, start(run, tiny)).resume(QUIET) == 0
    assert not run.best.exists()
    assert list(run.folder.glob("*.next")) == []
