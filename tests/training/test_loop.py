"""The training loop: seeds, length, what is due after which step, resuming, and stopping."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from movq_cli import runs
from movq_cli.console import Console
from movq_cli.errors import FailureError, InterruptedRunError
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training import loop
from movq_cli.training.log import Metrics
from movq_cli.training_settings import TrainVQSettings
from tests.training.toy import ToyStage

QUIET = Console(quiet=True)


def train(stage: ToyStage, run: Run, tiny: Preset, steps: int) -> Metrics:
    manifest = runs.start_or_resume(
        run, runs.new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=steps, data="d")
    )
    return loop.train(stage, run, manifest, QUIET)


def settings(tiny: Preset, **changes: int) -> TrainVQSettings:
    intervals = {"log_every": 1, "validate_every": 100, "checkpoint_every": 100, "evaluate_every": 0}
    return tiny.train_vq.model_copy(update=intervals | changes)


def test_every_step_of_every_seed_draws_other_numbers() -> None:
    draws = set()
    for seed in range(20):
        for step in [*range(20), 2**31]:
            torch.manual_seed(loop.step_seed(seed, step))
            draws.add(torch.rand(2, dtype=torch.float64).sum().item())
    assert len(draws) == 20 * 21


@given(st.integers(1, 10_000), st.integers(1, 64), st.floats(0.01, 50))
def test_epochs_become_an_integer_number_of_steps(images: int, batch: int, epochs: float) -> None:
    settings = TrainVQSettings(epochs=epochs, batch_size=batch)
    steps = settings.total_steps(images)
    assert steps >= 1
    assert steps == 1 or abs(steps - epochs * (images // batch)) <= 0.5


def test_validations_and_evaluations_are_at_their_intervals_and_at_the_end(tmp_path: Path, tiny: Preset) -> None:
    stage = ToyStage(settings(tiny, validate_every=3, evaluate_every=4))
    metrics = train(stage, Run(tmp_path, "vq"), tiny, 10)
    steps = {name: [step for call, step in stage.calls if call == name] for name, _ in stage.calls}
    assert steps == {"validate": [3, 6, 9, 10], "draw": [3, 6, 9, 10], "evaluate": [4, 8, 10]}
    assert metrics == {"psnr": stage.model.weight.item(), "rfid": 1.0}


def test_without_an_interval_nothing_is_evaluated(tmp_path: Path, tiny: Preset) -> None:
    stage = ToyStage(settings(tiny))
    assert train(stage, Run(tmp_path, "vq"), tiny, 3) == {"psnr": stage.model.weight.item()}
    assert [name for name, _ in stage.calls] == ["validate", "draw"]


def test_log_lines_are_means_over_the_steps_since_the_last_line(tmp_path: Path, tiny: Preset) -> None:
    for name, interval in (("each", 1), ("third", 3)):
        train(ToyStage(settings(tiny, log_every=interval)), Run(tmp_path / name, "vq"), tiny, 6)
    each, third = (
        [
            (line["step"], line["training"]["loss"])
            for line in map(json.loads, Run(tmp_path / name, "vq").log.read_text().splitlines())
            if "training" in line
        ]
        for name in ("each", "third")
    )
    losses = [loss for _, loss in each]
    assert [step for step, _ in each] == [1, 2, 3, 4, 5, 6]
    assert third == [(3, pytest.approx(sum(losses[:3]) / 3)), (6, pytest.approx(sum(losses[3:]) / 3))]


class StoppedStage(ToyStage):
    """Sends SIGTERM to its own process during a step."""

    def step(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(batch, step)


def test_a_stopped_run_writes_a_checkpoint_and_ends_as_if_it_had_not_been_stopped(tmp_path: Path, tiny: Preset) -> None:
    run, reference = Run(tmp_path / "run", "vq"), Run(tmp_path / "reference", "vq")
    train(ToyStage(settings(tiny)), reference, tiny, 9)
    with pytest.raises(InterruptedRunError, match=r"stopped at step 5 of 9.*Run the same command again to resume\."):
        train(StoppedStage(settings(tiny)), run, tiny, 9)
    assert (run.read().status, run.read().step) == ("running", 5)
    stage = ToyStage(settings(tiny))
    train(stage, run, tiny, 9)
    assert run.weights.read_text() == reference.weights.read_text()
    assert run.read().status == "finished"


def test_a_run_that_is_stopped_in_its_last_step_lacks_only_its_validation(tmp_path: Path, tiny: Preset) -> None:
    run = Run(tmp_path, "vq")
    with pytest.raises(InterruptedRunError, match="step 5 of 5"):
        train(StoppedStage(settings(tiny)), run, tiny, 5)
    assert (run.read().status, run.read().step) == ("running", 5)
    stage = ToyStage(settings(tiny))
    metrics = train(stage, run, tiny, 5)
    assert (stage.done, run.read().status) == (0, "finished")
    assert metrics == {"psnr": stage.model.weight.item()}


def test_a_run_killed_after_its_last_checkpoint_is_finished_without_a_step(tmp_path: Path, tiny: Preset) -> None:
    run = Run(tmp_path, "vq")
    train(ToyStage(settings(tiny)), run, tiny, 5)
    run.write(run.read().model_copy(update={"status": "running", "finished": None}))
    stage = ToyStage(settings(tiny, evaluate_every=2))
    metrics = train(stage, run, tiny, 5)
    assert (stage.done, run.read().status) == (0, "finished")
    assert metrics == {"psnr": stage.model.weight.item(), "rfid": 1.0}


def test_a_run_that_is_resumed_with_fewer_steps_than_it_has_done_is_finished(tmp_path: Path, tiny: Preset) -> None:
    run = Run(tmp_path, "vq")
    train(ToyStage(settings(tiny)), run, tiny, 5)
    stage = ToyStage(settings(tiny))
    assert train(stage, run, tiny, 3) == {"psnr": stage.model.weight.item()}
    assert (stage.done, run.read().status, run.read().step) == (0, "finished", 5)


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_step_that_is_not_finite_ends_the_run_at_the_next_line(tmp_path: Path, tiny: Preset, log_every: int) -> None:
    run = Run(tmp_path / "run", "vq")
    with pytest.raises(FailureError, match=r"step 6 is not finite \(loss nan\).*image 5"):
        train(ToyStage(settings(tiny, log_every=log_every), not_finite=5), run, tiny, 9)
    assert json.loads((run.folder / "nonfinite.json").read_text())["batch"] == ["image 5"]
    reference = Run(tmp_path / "reference", "vq")
    train(ToyStage(settings(tiny)), reference, tiny, 5)
    assert run.weights.read_text() == reference.weights.read_text()
    assert run.read().step == 5


class Ill(ToyStage):
    """Has a warning from step 3 to step 5, and from step 7 on, each time with another number."""

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        return f"something is wrong ({means['loss']})" if step in {3, 4, 5} or step >= 7 else None


def test_a_warning_is_printed_when_it_begins(tmp_path: Path, tiny: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = runs.start_or_resume(
        Run(tmp_path, "vq"), runs.new_manifest("vq", preset_name="tiny", settings=tiny, steps=9, data="d")
    )
    loop.train(Ill(settings(tiny)), Run(tmp_path, "vq"), manifest, Console(quiet=True))
    lines = [line for line in capsys.readouterr().err.splitlines() if "something is wrong" in line]
    assert [line.split(":")[1].strip() for line in lines] == ["step 3", "step 7"]
