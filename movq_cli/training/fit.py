"""Whether a training fits into the memory of its device, and the settings with which it would."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from movq_cli import devices
from movq_cli.devices import Memory
from movq_cli.training.cost import Cost
from movq_cli.training_settings import TrainSettings

CLEARLY_TOO_MUCH = 1.25
"""Ratio of the estimated peak to the device's memory from which on a training is refused."""

_SHARE = 0.9
"""Share of the device's memory that a suggested setting may use."""

_LIBRARIES = 0.75
"""Memory in GiB of libraries, of the networks of LPIPS and of metrics, of validations and of writing a checkpoint."""

CostOf = Callable[[TrainSettings], Cost]
"""Returns the cost of a step with changed training settings."""


class Fit(NamedTuple):
    """Memory that a training needs and that there is, in GiB; on the CPU for all ranks of this machine."""

    peak: float
    """Estimated peak of the training, with what its processes hold before it."""
    needed: float
    """The same without what the processes hold before it."""
    memory: Memory

    @property
    def is_impossible(self) -> bool:
        """Whether the training clearly cannot fit."""
        return self.peak > CLEARLY_TOO_MUCH * self.memory.total

    @property
    def is_tight(self) -> bool:
        """Whether the training may not fit."""
        return self.peak > self.memory.total or self.needed > self.memory.available

    @property
    def limit(self) -> float:
        """Memory that a training with other settings may need."""
        before = self.peak - self.needed
        now = min(_SHARE * (self.memory.total - before), self.memory.available)
        # If other programs hold the memory now, the settings have to suit the device as a whole.
        return now if now > self.memory.total / 2 else _SHARE * (self.memory.total - before)


def fit(cost: Cost, device: torch.device, ranks: int, memory: Memory | None = None) -> Fit:
    """Compare the memory of a training with that of its device.

    Args:
        cost: Cost of a step on one rank.
        device: Device of the training.
        ranks: Number of ranks that share the device's memory.
        memory: Memory to compare with; None reads that of the device.
    """
    needed = ranks * needed_memory(cost)
    before = ranks * devices.process_memory() if device.type == "cpu" else 0.0
    return Fit(before + needed, needed, memory or devices.memory(device))


def needed_memory(cost: Cost) -> float:
    """Return the peak memory of a step in GiB, beside what the process holds before the training."""
    return _LIBRARIES + cost.memory["total"]


def remedies(section: str, train: TrainSettings, cost_of: CostOf, limit: float, ranks: int) -> list[str]:
    """Return changes of settings, each of which makes a training fit; empty if none does.

    Args:
        section: Section of the settings, `train_vq` or `train_prior`.
        train: Training settings, which do not fit.
        cost_of: Function that returns the cost of a step with other training settings.
        limit: Memory in GiB that one rank may need.
        ranks: Number of ranks that share each batch.

    Returns:
        Texts such as `-o train_vq.accumulate=4`.
    """
    found = []
    share = train.batch_size // ranks
    images = most_images(train, cost_of, limit, ranks)
    if images:
        found.append(f"-o {section}.accumulate={smallest_accumulate(share, images)}")
    if not train.activation_checkpointing:
        with_checkpointing = train.model_copy(update={"activation_checkpointing": True})
        if needed_memory(cost_of(with_checkpointing)) <= limit:
            found.append(f"-o {section}.activation_checkpointing=true")
        elif not images and (fewer := most_images(with_checkpointing, cost_of, limit, ranks)):
            parts = smallest_accumulate(share, fewer)
            found.append(f"-o {section}.activation_checkpointing=true -o {section}.accumulate={parts}")
    if images:
        found.append(f"-o {section}.batch_size={images * ranks * train.accumulate}")
    return found


def advice(found: list[str]) -> str:
    """Return a sentence that names the changes of settings from `remedies`."""
    if not found:
        return "Even one image at a time does not fit: choose smaller models, or another device with --device."
    return f"Set {', or '.join(found)}."


def smallest_accumulate(share: int, images: int) -> int:
    """Return the smallest number of equal parts of a rank's share of a batch that have at most `images` images."""
    return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= images)


def most_images(train: TrainSettings, cost_of: CostOf, limit: float, ranks: int) -> int:
    """Return the largest number of images in a pass of a rank with which a training fits; 0 if there is none.

    Args:
        train: Training settings; the result is at most the number of images in their passes.
        cost_of: Function that returns the cost of a step with other training settings.
        limit: Memory in GiB that one rank may need.
        ranks: Number of ranks that share each batch.
    """
    most = train.batch_size // ranks // train.accumulate
    while most > 0:
        cost = cost_of(train.model_copy(update={"batch_size": most * ranks, "accumulate": 1}))
        excess = needed_memory(cost) - limit
        if excess <= 0:
            return most
        # The activations grow with the number of images, and the other parts do not.
        of_image = max((cost.memory["activations"] + cost.memory["transient"]) / most, 1e-9)
        most = min(most - 1, int(most - excess / of_image))
    return 0
