"""The log of a killed run goes on from its last checkpoint, in JSON lines and in TensorBoard events."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from movq_cli import runs
from movq_cli.console import Console
from movq_cli.files import atomic_write
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training import loop
from movq_cli.training.rewind import rewind
from tests.training.toy import ToyStage

INTERVALS = {"log_every": 1, "validate_every": 3, "checkpoint_every": 4, "evaluate_every": 0, "tensorboard": True}


class KilledError(Exception):
    """Stands for the end of a process that writes nothing more."""


class KilledStage(ToyStage):
    """Ends without a checkpoint at a step."""

    killed_at = 7

    def step(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        if step == self.killed_at:
            raise KilledError
        return super().step(batch, step)


def train(stage: ToyStage, run: Run, tiny: Preset, steps: int = 10) -> None:
    manifest = runs.start_or_resume(
        run, runs.new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=steps, data="d")
    )
    loop.train(stage, run, manifest, Console(quiet=True))


def killed(run: Run, tiny: Preset) -> Run:
    """Train to step 7, of which steps 5 to 7 and the validation of step 6 come after the last checkpoint."""
    with pytest.raises(KilledError):
        train(KilledStage(tiny.train_vq.model_copy(update=INTERVALS)), run, tiny)
    return run


def resume(run: Run, tiny: Preset, steps: int = 10) -> None:
    train(ToyStage(tiny.train_vq.model_copy(update=INTERVALS)), run, tiny, steps)


def logged(run: Run) -> list[tuple[str, int]]:
    """Return the kind and the step of each line of the log."""
    records = [json.loads(line) for line in run.log.read_text().splitlines()]
    return [("validation" if "validation" in record else "training", record["step"]) for record in records]


def events(run: Run) -> Counter[tuple[str, int]]:
    """Return how often each scalar is in the event files at each step."""
    return Counter(
        (value.tag, event.step)
        for path in sorted(run.events.iterdir())
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    )


EVERY_STEP = [("training", step) for step in range(1, 11)] + [("validation", step) for step in (3, 6, 9, 10)]


def test_each_step_is_logged_once_after_a_kill_and_in_order(tmp_path: Path, tiny: Preset) -> None:
    run = killed(Run(tmp_path, "vq"), tiny)
    assert ("training", 7) in logged(run)
    resume(run, tiny)
    assert sorted(logged(run)) == sorted(EVERY_STEP)
    assert [step for _, step in logged(run)] == sorted(step for _, step in logged(run))
    assert set(events(run).values()) == {1}
    assert {step for tag, step in events(run) if tag == "loss"} == set(range(1, 11))
    assert {step for tag, step in events(run) if tag == "validation/psnr"} == {3, 6, 9, 10}


def test_a_run_that_is_killed_before_its_first_checkpoint_logs_each_step_once(tmp_path: Path, tiny: Preset) -> None:
    run = Run(tmp_path, "vq")
    stage = KilledStage(tiny.train_vq.model_copy(update=INTERVALS))
    stage.killed_at = 3
    with pytest.raises(KilledError):
        train(stage, run, tiny)
    assert not run.checkpoint.exists()
    resume(run, tiny)
    assert sorted(logged(run)) == sorted(EVERY_STEP)
    assert set(events(run).values()) == {1}


def test_a_killed_run_that_ends_earlier_has_no_later_steps(tmp_path: Path, tiny: Preset) -> None:
    run = killed(Run(tmp_path, "vq"), tiny)
    resume(run, tiny, steps=5)
    assert max(step for _, step in logged(run)) == max(step for _, step in events(run)) == 5


def test_a_validation_that_is_made_again_is_logged_once(tmp_path: Path, tiny: Preset) -> None:
    run = Run(tmp_path, "vq")
    resume(run, tiny, steps=5)
    run.write(run.read().model_copy(update={"status": "running", "finished": None}))
    resume(run, tiny, steps=5)  # It was killed between its last checkpoint and its end.
    assert Counter(logged(run)) == Counter(
        [*(("training", step) for step in range(1, 6)), ("validation", 3), ("validation", 5)]
    )
    assert set(events(run).values()) == {1}


def test_what_a_killed_process_wrote_in_part_is_removed(tmp_path: Path, tiny: Preset) -> None:
    run = killed(Run(tmp_path, "vq"), tiny)
    whole = run.log.read_bytes()
    (path,) = run.events.iterdir()
    records = path.read_bytes()
    for cut in (1, 5, 40):
        run.log.write_bytes(whole[:-cut])
        path.write_bytes(records[:-cut])
        rewind(run, 7, repeats_validation=False)
        assert logged(run)[-1] == ("validation", 6)
        assert max(events(run), key=lambda pair: pair[1])[1] in {6, 7}
    changed = whole.replace(b'"step": 3', b'"step": 1', 1)
    run.log.write_bytes(changed)
    assert rewind(run, 7, repeats_validation=False) == 1
    assert run.log.read_bytes().count(b"\n") == whole.count(b"\n") - 1
    assert rewind(run, 7, repeats_validation=False) == 0
    rewind(run, 2, repeats_validation=False)
    assert logged(run) == [("training", 1), ("training", 2)]
    assert set(events(run)) == {("loss", 1), ("loss", 2)} | {pair for pair in events(run) if pair[0] != "loss"}


@pytest.mark.parametrize("step", [0, 1, 127, 128, 300, 2**31, 2**40])
def test_large_steps_are_read_from_events(tmp_path: Path, step: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    run = Run(tmp_path, "vq")
    with SummaryWriter(run.events) as writer:
        for number in (step, step + 1):
            writer.add_scalar("loss", 1.0, number)
    rewind(run, step, repeats_validation=False)
    assert events(run) == {("loss", step): 1}


def test_a_full_disk_under_the_log_costs_a_warning(
    tmp_path: Path, tiny: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run", "vq")
    run.folder.mkdir()
    run.log.symlink_to("/dev/full")
    run.events.write_text("a file in place of the folder")
    resume(run, tiny)
    assert run.read().status == "finished"
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" cannot")[0] for line in lines] == [f"warning: {run.events}", f"warning: {run.log}"]


class PictureStage(ToyStage):
    """Cannot write its pictures."""

    def draw(self, run: Run, step: int) -> None:
        atomic_write(run.log / "picture.png", b"")


def test_a_picture_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, tiny: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, "vq")
    train(PictureStage(tiny.train_vq.model_copy(update=INTERVALS)), run, tiny)
    assert run.read().status == "finished"
    assert "warning: step 3 has no picture: " in capsys.readouterr().err


def test_a_disk_that_becomes_full_costs_only_the_lines_that_do_not_fit(tmp_path: Path, tiny: Preset) -> None:
    reference = Run(tmp_path / "reference", "vq")
    resume(reference, tiny)
    run = Run(tmp_path / "run", "vq")
    resume(run, tiny, steps=4)
    run.log.chmod(0o444)
    is_root = os.access(run.log, os.W_OK)
    if is_root:
        shutil.move(run.log, tmp_path / "log")
        run.log.symlink_to(tmp_path)  # A folder can be written by nobody.
    resume(run, tiny)
    assert run.weights.read_text() == reference.weights.read_text()
