"""The plan of a training: its parameters, its length and the cost of a step, as a table and as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from movq_cli.console import Console
from movq_cli.data.sampler import EpochOrder
from movq_cli.training.cost import Cost
from movq_cli.training_settings import TrainSettings

Plan = dict[str, Any]
"""The plan of a training command, as a JSON object: parameters, length of the run, cost of a step."""

_DISPLAYED_NAMES = {"quantize": "quantizer"}
"""Parts of a model whose displayed name is not the name that published weights use."""

_MEASURED_NAMES = {"hours", "seconds_per_step", "time_from"}
"""Entries of a plan that are null if nothing was measured."""


def parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each part of a model, and their total."""
    parts = {_DISPLAYED_NAMES.get(name, name): _parameter_count(part) for name, part in model.named_children()}
    return {**parts, "total": _parameter_count(model)}


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan as the result of the command (`--dry-run`)."""
    rows = [(name, _as_text(name, value)) for name, value in flatten(plan)]
    console.table(plan, ["setting", "value"], rows)


def warn_of_late_discriminator(plan: Plan, console: Console) -> None:
    """Warn if the plan has a discriminator whose loss would begin after the end of the run."""
    start, steps = plan.get("discriminator_start"), plan["steps"]
    if plan.get("discriminator") and start is not None and steps is not None and start >= steps:
        console.warn(
            f"the adversarial loss begins at step {start:,}, but the run ends at {steps:,}: the discriminator has no "
            "effect. Set train_vq.discriminator_start, to 50% for example."
        )


def announce(plan: Plan, console: Console) -> None:
    """Log a plan, with one line for each of its entries."""
    for name, value in plan.items():
        text = (
            ", ".join(f"{key} {_as_text(key, part)}" for key, part in value.items())
            if isinstance(value, dict)
            else None
        )
        console.log(f"{name.replace('_', ' ')}: {text or _as_text(name, value)}")


def length(train: TrainSettings, images: int | None, ranks: int) -> Plan:
    """Return the plan's entries about the length of a run; those that depend on unknown images are null.

    Args:
        train: Training settings.
        images: Number of images, or of views of images, in an epoch; None if it is not known.
        ranks: Number of ranks that share each batch.

    Raises:
        BadRequestError: There are fewer images than one batch needs.
    """
    steps, steps_per_epoch, epochs = train.steps, None, train.epochs
    if images is not None:
        steps = train.total_steps(images)
        steps_per_epoch = EpochOrder(images, train.batch_size, train.seed).steps_per_epoch
        epochs = train.epochs or round(steps / steps_per_epoch, 2)
    return {
        "steps": steps,
        "steps_per_epoch": steps_per_epoch,
        "epochs": epochs,
        "batch_size": train.batch_size,
        "batch_size_at_once": train.batch_size // ranks // train.accumulate,
        "ranks": ranks,
        "learning_rate": train.learning_rate,
    }


def costs(cost: Cost) -> Plan:
    """Return the plan's entries about the cost of a step on each rank."""
    return {"memory_gib": cost.memory, "tflop_per_step": round(cost.flops / 1e12, 3)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each leaf of nested settings or entries."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _as_text(name: str, value: object) -> str:
    if value is None:
        return "not measured" if name in _MEASURED_NAMES else "depends on the images"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
