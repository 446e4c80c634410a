"""The hours and the memory of a training on this device, and the number of steps for given hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from movq_cli import devices, presets
from movq_cli.console import Console
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.run_manifest import SECTIONS, Kind, train_settings
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training import cost, pace
from movq_cli.training import fit as memory_fit
from movq_cli.training.cost import Cost
from movq_cli.training.fit import Fit, advice
from movq_cli.training.pace import Pace
from movq_cli.training_settings import TrainSettings

_SHORT_SECONDS = 1.0
"""A run whose arithmetic alone takes less than this at the device's matrix rate is not measured."""

_SLOW_SECONDS = 1.0
"""A step is not measured without being requested if the arithmetic of one image takes longer than this: some
ten passes are measured, and each takes longer than its arithmetic."""

_MEASURED, _ARITHMETIC = "measured steps", "arithmetic alone, a lower bound"


def with_training(settings: Preset, kind: Kind, train: TrainSettings) -> Preset:
    """Return settings with other training settings of a kind of run."""
    return settings.model_copy(update={SECTIONS[kind]: train})


def cost_of(settings: Preset, kind: Kind, device: torch.device, ranks: int = 1) -> Cost:
    """Return the cost of a step on each of so many ranks."""
    if kind == "vq":
        return cost.of_tokenizer(settings.vq, settings.train_vq, device, ranks)
    return cost.of_prior(settings.prior, settings.vq.code_shape, settings.train_prior, device, ranks)


def measure(
    settings: Preset, kind: Kind, device: torch.device, *, validation_images: int, weights: Path | None, ranks: int = 1
) -> Pace:
    """Measure the time of steps and validations, as `training.pace` does, which takes seconds."""
    of_kind = pace.of_tokenizer if kind == "vq" else pace.of_prior
    return of_kind(settings, device, validation_images=validation_images, weights=weights, ranks=ranks)


def images_per_epoch(settings: Preset, kind: Kind, images: PreparedSet) -> int:
    """Return the number of images, or of their views for a prior, in an epoch."""
    return images.manifest.counts["train"] * (1 if kind == "vq" else settings.views.count)


def remedies(
    settings: Preset, kind: Kind, device: torch.device, fitted: Fit, ranks: int = 1, sharing: int = 1
) -> list[str]:
    """Return changes of settings, each of which makes a training fit into the memory of its device.

    Args:
        settings: Settings with which it does not fit.
        kind: Kind of the run.
        device: Device of the training.
        fitted: Memory that the training needs and that there is.
        ranks: Number of ranks that share each batch.
        sharing: Number of ranks that share the memory of the device.
    """
    return memory_fit.remedies(
        SECTIONS[kind],
        train_settings(settings, kind),
        lambda train: cost_of(with_training(settings, kind, train), kind, device, ranks),
        fitted.limit / sharing,
        ranks,
    )


def require_one_length(kind: Kind, overrides: Sequence[str], hours: float | None) -> None:
    """Refuse a request that gives the hours of a run beside its number of steps or epochs.

    Raises:
        BadRequestError: It gives both.
    """
    given = _lengths(kind, overrides)
    if hours is not None and given:
        raise BadRequestError(f"--hours and -o {given[0]} both give the length of the run", "Leave out one of them.")


def _lengths(kind: Kind, overrides: Sequence[str]) -> list[str]:
    """Return the overrides that give the length of a run."""
    names = {f"{SECTIONS[kind]}.steps", f"{SECTIONS[kind]}.epochs"}
    return [override for override in overrides if override.partition("=")[0] in names]


@dataclass
class Outlook:
    """The length, the hours and the memory of the training of a request, on one rank."""

    kind: Kind
    images: PreparedSet | None
    """Prepared set; None if it does not exist yet."""
    device: torch.device
    weights: Path | None
    """Folder of the pretrained weights."""
    world_size: int = 1
    """Number of ranks that share each batch."""
    ranks: Ranks = SINGLE_PROCESS
    """The ranks; a single one plans for `world_size` ranks in a dry run."""
    done: int = 0
    """Number of steps that the run has done already."""
    measured: Pace | None = None
    """The measured times; None before the measurement."""

    def length(
        self, settings: Preset, preset_name: str, overrides: Sequence[str], hours: float | None, run: Run
    ) -> tuple[Preset, float | None]:
        """Return the settings with the length that `--hours` gives to the run, and these hours.

        A run in the folder keeps the length that it got from `--hours`, unless the request gives another one.

        Args:
            settings: Settings of the preset with the overrides.
            preset_name: Name of the preset.
            overrides: Settings that the request changes.
            hours: Time for the complete training; None leaves the length to the settings or to the run.
            run: Folder of the run.
        """
        section, given = SECTIONS[self.kind], _lengths(self.kind, overrides)
        before = self.ranks.from_first(lambda: run.read() if run.manifest_file.exists() else None)
        self.done = max(self.done, 0 if before is None else before.step)
        if before is not None and before.hours is not None and not given and hours in {None, before.hours}:
            steps, hours = before.steps, before.hours
        elif hours is not None:
            steps = self._steps_within(settings, 3600 * hours, is_branch=before is None)
        else:
            return settings, None
        return presets.load(preset_name, [*overrides, f"{section}.epochs=null", f"{section}.steps={steps}"]), hours

    def entries(self, settings: Preset, plan: dict[str, Any], console: Console) -> dict[str, Any]:
        """Return the plan's entries about time and memory, and warn if the training may not fit.

        Args:
            settings: Settings of the training.
            plan: The plan's other entries.
            console: Console for the warning.
        """
        fitted = self.fit(plan)
        if fitted.is_tight and not fitted.is_impossible:
            console.warn(
                f"the training needs about {fitted.peak:.1f} GiB of memory and may not fit: {self.device} has "
                f"{fitted.memory.total:.1f} GiB, of which {fitted.memory.available:.1f} are available. "
                + advice(self._remedies(settings, fitted))
            )
        return {
            **self._time(settings, plan, fitted),
            "peak_memory_gib": round(fitted.peak, 2),
            "device_memory_gib": {name: round(size, 2) for name, size in fitted.memory._asdict().items()},
        }

    def require_memory(self, settings: Preset, plan: dict[str, Any]) -> None:
        """Refuse a training that clearly does not fit.

        Raises:
            BadRequestError: It needs much more memory than its device has; the hint names settings that fit.
        """
        fitted = self.fit(plan)
        if fitted.is_impossible:
            raise BadRequestError(
                f"the training needs about {fitted.peak:.1f} GiB of memory, but {self.device} has "
                f"{fitted.memory.total:.1f} GiB",
                advice(self._remedies(settings, fitted)),
            )

    def fit(self, plan: dict[str, Any]) -> Fit:
        """Return the memory that the training needs and that there is."""
        return memory_fit.fit(Cost(plan["memory_gib"], 0), self.device, self._sharing)

    @property
    def _sharing(self) -> int:
        """Number of ranks that share the memory of the device."""
        if self.device.type == "cuda":
            return 1
        return self.world_size if self.ranks.world_size == 1 else self.ranks.local_world_size

    def _remedies(self, settings: Preset, fitted: Fit) -> list[str]:
        return remedies(settings, self.kind, self.device, fitted, self.world_size, self._sharing)

    def _steps_within(self, settings: Preset, seconds: float, *, is_branch: bool) -> int:
        """Return the number of steps of a run that takes so long; a branch has those of its origin in addition."""
        epoch = self._epoch(settings)  # Before the measurement: it refuses a batch that is larger than the set.
        steps = self._measure(settings).steps(train_settings(settings, self.kind), seconds, epoch)
        return self.done + steps if is_branch else max(self.done, steps)

    def _time(self, settings: Preset, plan: dict[str, Any], fitted: Fit) -> dict[str, Any]:
        train, steps = train_settings(settings, self.kind), plan["steps"]
        arithmetic = self.ranks.from_first(
            lambda: plan["tflop_per_step"] * 1e12 / devices.matrix_rate(self.device, train.precision)
        )
        left = 1000 if steps is None else max(0, steps - self.done)
        is_slow = self.ranks.any(fitted.is_impossible) or arithmetic / plan["batch_size_at_once"] > _SLOW_SECONDS
        if self.measured is None and left * arithmetic < _SHORT_SECONDS:
            return {"hours": None, "seconds_per_step": None, "time_from": None}
        if self.measured is None and is_slow:
            of_step, source = arithmetic, _ARITHMETIC
        else:
            whole = left if steps is None else steps
            seconds = self._measure(settings).seconds(train, whole, self._epoch(settings))
            of_step, source = seconds / whole, _MEASURED
        hours = None if steps is None else round(left * of_step / 3600, 3)
        return {"hours": hours, "seconds_per_step": round(of_step, 4), "time_from": source}

    def _measure(self, settings: Preset) -> Pace:
        """Measure the training once, on all ranks at the same time; the slowest one counts."""
        if self.measured is None:
            images = 0 if self.images is None else self.images.manifest.counts["val"]
            own = measure(
                settings,
                self.kind,
                self.device,
                validation_images=images,
                weights=self.weights,
                ranks=self.world_size,
            )
            self.measured = Pace(*map(max, zip(*self.ranks.all_gather(tuple(own)), strict=True)))
        return self.measured

    def _epoch(self, settings: Preset) -> int:
        """Return the number of steps in an epoch; that of an unknown set is arbitrary."""
        train = train_settings(settings, self.kind)
        if self.images is None:
            return max(1, 10_000 // train.batch_size)
        images = images_per_epoch(settings, self.kind, self.images)
        return EpochOrder(images, train.batch_size, train.seed).steps_per_epoch
