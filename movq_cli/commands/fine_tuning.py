"""The settings of a run that begins with trained weights."""

from __future__ import annotations

import json
from collections.abc import Sequence

from movq_cli import presets
from movq_cli.errors import BadRequestError
from movq_cli.training.initial_weights import InitialWeights
from movq_cli.training_settings import TrainVQSettings

_WARMUP = 500
"""Largest number of steps for which a new discriminator is trained before its loss begins."""


def overrides(initial: InitialWeights, preset_name: str, given: Sequence[str]) -> list[str]:
    """Return the overrides of a preset with which these weights can be fine-tuned.

    The architecture is that of the weights. If the run has an adversarial loss and the weights have no discriminator,
    or the user gives it another layout, a new one is trained for some steps before its loss begins.

    Args:
        initial: The weights.
        preset_name: Name of the preset, or path of a preset file.
        given: Overrides that the user gives.

    Raises:
        BadRequestError: An override contradicts the weights.
    """
    values = [f"vq.{name}={json.dumps(value)}" for name, value in initial.settings.model_dump(mode="json").items()]
    if initial.discriminator is not None:
        values += [f"train_vq.{name}={json.dumps(value)}" for name, value in initial.discriminator.settings.items()]
    chosen = [*values, *given]
    settings = presets.load(preset_name, chosen)
    for name, value in initial.settings:
        if getattr(settings.vq, name) != value:
            raise BadRequestError(
                f"vq.{name} is {getattr(settings.vq, name)}, but the weights in {initial.path} have {value}",
                "Omit it: fine-tuning keeps the architecture of the weights.",
            )
    if settings.train_vq.adversarial_weight > 0 and initial.discriminator_of(settings.train_vq) is None:
        chosen += _warmup(settings.train_vq)
    return chosen


def _warmup(train: TrainVQSettings) -> list[str]:
    """Return overrides by which a new discriminator is trained before its loss begins."""
    steps = _WARMUP if train.steps is None else max(1, min(_WARMUP, train.steps // 10))
    needed = [] if train.discriminator_warmup else [f"train_vq.discriminator_warmup={steps}"]
    start = train.discriminator_start
    warmup = train.discriminator_warmup or steps
    if isinstance(start, int) and start < warmup:
        needed.append(f"train_vq.discriminator_start={warmup}")
    return needed
