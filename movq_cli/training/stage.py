"""The interface between the training loop and a stage of MoVQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from movq_cli.ranks import Ranks
from movq_cli.runs import Run
from movq_cli.settings import TrainSettings
from movq_cli.training.log import DeviceMetrics, Metrics
from movq_cli.training.trainable import FiniteCheck, Stateful


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

    def validate(self) -> Metrics:
        """Return the metrics of the exported weights on the validation split; they are equal on all ranks."""

    def evaluate(self) -> Metrics:
        """Return the FID on as many images as the settings say; it is equal on all ranks."""

    def score(self, metrics: Metrics) -> float:
        """Return the score of a validation; the weights of the highest score are saved as the best ones."""

    def parts(self) -> Mapping[str, Stateful]:
        """Return everything on which the next step depends: models, optimizers, running averages and counts."""

    def export(self, path: Path) -> None:
        """Write the weights for inference."""

    def draw(self, run: Run, step: int) -> None:
        """Write the run's picture of this step."""
