"""The measured times of a training, and the number of steps that fits into a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import quality
from movq_cli import devices, presets
from movq_cli.settings import Preset
from movq_cli.training import pace
from movq_cli.training.pace import Pace
from movq_cli.training_settings import TrainPriorSettings, TrainVQSettings

CPU = torch.device("cpu")
PACE = Pace(step=0.5, adversarial_step=0.8, validation=20.0, evaluation=30.0)


@pytest.mark.parametrize("seconds", [0.1, 33.0, 1000.0, 123_456.7])
@pytest.mark.parametrize("start", ["0%", "40%", "100%", "2 epochs", 300])
def test_the_number_of_steps_is_the_largest_that_fits(seconds: float, start: str | int) -> None:
    train = TrainVQSettings(discriminator_start=start, discriminator_warmup=50, ema_decay=0.9, evaluate_every=None)
    steps = PACE.steps(train, seconds, 95)
    assert steps == 1 or PACE.seconds(train, steps, 95) <= seconds
    assert PACE.seconds(train, steps + 1, 95) > seconds


def test_the_time_is_the_sum_of_steps_validations_and_evaluations() -> None:
    train = TrainVQSettings(discriminator_start=600, discriminator_warmup=100, validate_every=400, evaluate_every=1000)
    assert PACE.seconds(train, 1000, 95) == pytest.approx(500 * 0.5 + 500 * 0.8 + 3 * 20 + 30)
    # With an average, the first validation is one of the raw weights too.
    average = train.model_copy(update={"ema_decay": 0.99})
    assert PACE.seconds(average, 1000, 95) - PACE.seconds(train, 1000, 95) == pytest.approx(20)
    prior = TrainPriorSettings(validate_every=500)
    assert PACE.seconds(prior, 1000, 95) == pytest.approx(1000 * 0.5 + 2 * 20)


@pytest.mark.slow
def test_both_stages_are_measured_without_images_and_without_weights(
    tiny: Preset, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_SECONDS", 0.1)
    train = tiny.train_vq.model_copy(update={"perceptual_weight": 1.0, "accumulate": 2})
    preset = tiny.model_copy(update={"train_vq": train})
    few, many = (pace.of_tokenizer(preset, CPU, validation_images=count, weights=None) for count in (12, 1200))
    assert min(few.step, few.adversarial_step) > 0
    # Both validations were measured on the same number of images. Other work on the machine disturbs them.
    assert 10 < many.validation / few.validation < 1000
    assert few.evaluation == 0.0
    for mode, layers in (("mask", 2), ("depth", 3)):
        prior = tiny.prior.model_copy(update={"mode": mode, "layers": layers})
        changed = tiny.model_copy(update={"prior": prior})
        measured = pace.of_prior(changed, CPU, validation_images=12, weights=None, ranks=2)
        assert 0 < measured.step == measured.adversarial_step
    assert not list(tmp_path.iterdir())  # Nothing was downloaded or written.


TECHNIQUES = {
    name: changes
    for name, changes in (quality.ROWS | quality.PRIORS).items()
    if not all(change.startswith("sample.") for change in changes)
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", TECHNIQUES.values(), ids=TECHNIQUES)
def test_the_steps_of_each_technique_are_measured_with_a_part_of_a_batch(
    changes: tuple[str, ...], offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A step with one image takes a second, so that a batch would take too long, and three of its images are measured.
    monkeypatch.setattr(pace, "_SECONDS_PER_STEP", 3.0)

    def one_second(step: Callable[[], object], _device: torch.device) -> float:
        step()
        return 1.0

    monkeypatch.setattr(devices, "seconds", one_second)
    preset = presets.load(
        "photos-32", [quality.STRAIGHT_THROUGH, "train_vq.perceptual_weight=0", "prior.layers=2", *changes]
    )
    is_prior = any(change.startswith(("prior.", "train_prior.")) for change in changes)
    measure = pace.of_prior if is_prior else pace.of_tokenizer
    measured = measure(preset, CPU, validation_images=1, weights=None)
    assert min(measured.step, measured.adversarial_step) > 0
