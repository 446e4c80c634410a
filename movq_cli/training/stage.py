"""The interface between the training loop and a stage of MoVQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from movq_cli.ranks import Ranks
from movq_cli.runs import Run
from movq_cli.training.log import DeviceMetrics, Metrics
from movq_cli.training.trainable import FiniteCheck, Stateful
from movq_cli.training.watch import Watch
from movq_cli.training_settings import TrainSettings


class Criterion(NamedTuple):
    """The metric that decides which weights are the best ones."""

    metric: str
    """Name of the metric in a validation."""
    higher_is_better: bool

    def is_better(self, value: float, other: float) -> bool:
        """Return whether a value is better than another one."""
        return value > other if self.higher_is_better else value < other


class Stage(Protocol):
    """One stage in training: it owns the models and the update of one step; the loop does everything else."""

    @property
    def settings(self) -> TrainSettings:
        """Learning rate, intervals and seed."""

    @property
    def device(self) -> torch.device:
        """Device of the models."""

    @property
    def ranks(self) -> Ranks:
        """Ranks among which each batch is divided."""

    @property
    def finite_check(self) -> FiniteCheck:
        """FiniteCheck that stops all updates after the first step whose metrics are not finite."""

    def batches(self, start: int) -> Iterator[Any]:
        """Yield this rank's shares of the batches without end, from step `start` on."""

    def batch_names(self, step: int) -> list[str]:
        """Return the names of the images in the global batch of a step."""

    def step(self, batch: Any, step: int) -> DeviceMetrics:  # noqa: ANN401 - each stage has its own type of batch
        """Update the models on one batch and return scalar metrics, which stay on the device."""

    @property
    def loss_formula(self) -> str:
        """The terms of the metric "loss" with their weights, for the log."""

    @property
    def criterion(self) -> Criterion:
        """The metric of validations, or of evaluations, that decides which weights are saved as the best ones."""

    @property
    def validation_criterion(self) -> Criterion:
        """The metric of every validation by which weights are compared."""

    @property
    def evaluation_interval(self) -> int:
        """Number of steps between evaluations; 0 if there are none."""

    @property
    def milestones(self) -> frozenset[int]:
        """Numbers of steps after which a checkpoint is written that stays."""

    @property
    def optional_parts(self) -> frozenset[str]:
        """Names of parts that the checkpoint of a run with other settings may lack; they start anew."""

    @property
    def settled_after(self) -> int:
        """Number of steps up to which validations do not count for an early stop: what is trained changes until then.

        Validations of a tokenizer worsen or stay before its discriminator improves it, and those of a prior stay while
        it learns random orders.
        """

    @property
    def validates_first(self) -> bool:
        """Whether the initial weights are validated before the first step."""

    @property
    def has_average(self) -> bool:
        """Whether the exported weights are a running average."""

    def validate(self, watch: Watch, *, averaged: bool = True) -> Metrics:
        """Return the metrics on the validation split; they are equal on all ranks.

        Args:
            watch: Watch that ends the validation if the training is to stop.
            averaged: Whether the exported weights are validated; otherwise those of the last step.
        """

    def evaluate(self, watch: Watch) -> Metrics:
        """Return the FID of the exported weights on as many images as the settings say; it is equal on all ranks."""

    def event(self, step: int) -> str | None:
        """Return what begins at the step of this index, for the log; None for most steps."""

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        """Return a warning about the means of the metrics since the last log line; None if they are healthy."""

    def parts(self) -> Mapping[str, Stateful]:
        """Return everything on which the next step depends: models, optimizers, running averages and counts."""

    def export(self, path: Path) -> None:
        """Write the weights for inference."""

    def draw(self, run: Run, step: int) -> None:
        """Write the run's picture of this step."""
