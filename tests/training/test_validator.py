"""Validations: their interruption, the comparison of averaged and raw weights, and the criterion of the best ones."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from movq_cli import runs
from movq_cli.console import Console
from movq_cli.errors import InterruptedRunError
from movq_cli.ranks import SINGLE_PROCESS
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training import loop
from movq_cli.training.log import Metrics
from movq_cli.training.watch import UNWATCHED, StoppedValidationError, Watch, batch_count
from movq_cli.training_settings import TrainVQSettings
from tests.training.toy import EvaluatedStage, ToyStage

QUIET = Console(quiet=True)


def train(stage: ToyStage, run: Run, tiny: Preset, steps: int) -> Metrics:
    manifest = runs.start_or_resume(
        run, runs.new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=steps, data="d")
    )
    return loop.train(stage, run, manifest, QUIET)


def every_second(tiny: Preset) -> TrainVQSettings:
    intervals = {"log_every": 1, "validate_every": 2, "checkpoint_every": 100, "evaluate_every": 0}
    return tiny.train_vq.model_copy(update=intervals)


class StoppedInValidation(ToyStage):
    """Receives SIGTERM during the validation after step 4."""

    def during_validation(self) -> None:
        if self.done == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_stopped_in_a_validation_resumes_with_it_and_ends_as_without_the_stop(
    tmp_path: Path, tiny: Preset
) -> None:
    whole, stopped = Run(tmp_path / "whole", "vq"), Run(tmp_path / "stopped", "vq")
    expected = train(ToyStage(every_second(tiny)), whole, tiny, 7)
    with pytest.raises(InterruptedRunError, match="stopped at step 4 of 7"):
        train(StoppedInValidation(every_second(tiny)), stopped, tiny, 7)
    assert (stopped.read().step, stopped.read().best_step) == (4, 2)
    resumed = ToyStage(every_second(tiny))
    assert train(resumed, stopped, tiny, 7) == expected
    assert [step for call, step in resumed.calls if call == "draw"] == [4, 6, 7]
    assert stopped.weights.read_text() == whole.weights.read_text()
    assert stopped.best.read_text() == whole.best.read_text()
    manifests = [run.read().model_dump(exclude={"started", "finished", "digest"}) for run in (stopped, whole)]
    assert manifests[0] == manifests[1]


class Averaged(ToyStage):
    """Its average is worse than its weights until step 4; its validations cost nothing."""

    @property
    def has_average(self) -> bool:
        return True

    def validate(self, watch: Watch = UNWATCHED, *, averaged: bool = True) -> Metrics:
        self.calls.append(("averaged" if averaged else "raw", self.done))
        return {"psnr": min(self.done, 4.0) if averaged else 4.0}


def test_the_raw_weights_are_validated_too_until_the_average_is_as_good(tmp_path: Path, tiny: Preset) -> None:
    run, stage = Run(tmp_path, "vq"), Averaged(every_second(tiny))
    train(stage, run, tiny, 8)
    assert [step for call, step in stage.calls if call == "averaged"] == [2, 4, 6, 8]
    assert [step for call, step in stage.calls if call == "raw"] == [2, 4]
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    raw = {line["step"]: line["validation_of_raw_weights"] for line in lines if "validation_of_raw_weights" in line}
    assert raw == {2: {"psnr": 4.0}, 4: {"psnr": 4.0}}


class Lower(EvaluatedStage):
    """Its best weights are those of the lowest rFID, which every third step computes."""

    def evaluate(self, watch: Watch = UNWATCHED) -> Metrics:
        return {"rfid": {3: 20.0, 6: 10.0, 9: 30.0, 10: float("nan")}[self.done]}


def test_the_best_weights_are_those_of_the_criterion_wherever_it_is_computed(tmp_path: Path, tiny: Preset) -> None:
    run = Run(tmp_path, "vq")
    train(Lower(every_second(tiny)), run, tiny, 10)
    manifest = run.read()
    assert (manifest.best_step, manifest.best_by, manifest.best_score) == (6, "rfid", 10.0)


def test_a_best_value_of_another_metric_is_not_compared(tmp_path: Path, tiny: Preset) -> None:
    run = Run(tmp_path, "vq")
    train(ToyStage(every_second(tiny)), run, tiny, 2)
    assert run.read().best_by == "psnr"
    train(Lower(every_second(tiny)), run, tiny, 3)
    assert (run.read().best_step, run.read().best_by) == (3, "rfid")


def test_a_watch_yields_every_batch_and_ends_at_once_when_it_is_told_to() -> None:
    asked = []

    def stops() -> bool:
        asked.append(1)
        return len(asked) > 2

    seen: list[str] = []
    with pytest.raises(StoppedValidationError):
        seen.extend(Watch(QUIET, SINGLE_PROCESS, stops).batches("abcd", 4, "validating"))
    assert list(UNWATCHED.batches("abc", 3, "validating")) == ["a", "b", "c"]
    # A rank with fewer batches than another one takes part in all rounds.
    assert list(UNWATCHED.batches("ab", 3, "validating")) == ["a", "b"]
    assert len(asked) == 3


@pytest.mark.parametrize(("images", "size", "count"), [(10, 4, 3), (8, 4, 2), (1, 4, 1), (0, 4, 0)])
def test_the_number_of_batches_is_that_of_the_largest_share(images: int, size: int, count: int) -> None:
    assert batch_count(images, size, SINGLE_PROCESS) == count
