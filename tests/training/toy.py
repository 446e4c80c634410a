"""A stage of one weight, whose training takes no time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.runs import Run
from movq_cli.training.log import DeviceMetrics, Metrics
from movq_cli.training.stage import Criterion
from movq_cli.training.trainable import FiniteCheck, Stateful
from movq_cli.training.watch import UNWATCHED, Watch
from movq_cli.training_settings import TrainSettings


class ToyStage:
    """Adds a random number to its weight in each step, and records what the loop calls.

    Args:
        settings: Training settings.
        ranks: Ranks of the run.
        not_finite: Step whose metrics are not finite; None = all are.
    """

    def __init__(
        self, settings: TrainSettings, ranks: Ranks = SINGLE_PROCESS, *, not_finite: int | None = None
    ) -> None:
        self.settings = settings
        self.ranks = ranks
        self.not_finite = not_finite
        self.device = torch.device("cpu")
        self.finite_check = FiniteCheck(self.device, ranks)
        self.model = nn.Linear(1, 1, bias=False)
        self.model.weight.data.zero_()
        self.calls: list[tuple[str, int]] = []
        self.done = 0

    def batches(self, start: int) -> Iterator[Tensor]:
        while True:
            yield torch.tensor(float(start))
            start += 1

    def batch_names(self, step: int) -> list[str]:
        return [f"image {step}"]

    def step(self, batch: Tensor, step: int) -> DeviceMetrics:
        assert int(batch) == step
        loss = torch.rand(()) if step != self.not_finite else torch.tensor(math.nan)
        metrics = {"loss": loss}
        self.model.weight.data += loss.nan_to_num() * self.finite_check.update(step, metrics)
        self.done = step + 1
        return metrics

    def validate(self, watch: Watch = UNWATCHED, *, averaged: bool = True) -> Metrics:
        self.calls.append(("validate", self.done))
        for _ in watch.batches(range(3), 3, "validating"):
            self.during_validation()
        return {"psnr": self.model.weight.item()}

    def during_validation(self) -> None:
        """Nothing; a test replaces it."""

    def evaluate(self, watch: Watch = UNWATCHED) -> Metrics:
        self.calls.append(("evaluate", self.done))
        return {"rfid": 1.0}

    @property
    def loss_formula(self) -> str:
        return "a random number"

    @property
    def criterion(self) -> Criterion:
        return Criterion("psnr", higher_is_better=True)

    @property
    def validation_criterion(self) -> Criterion:
        return self.criterion

    @property
    def evaluation_interval(self) -> int:
        return self.settings.evaluation_interval(has_weights=False)

    @property
    def milestones(self) -> frozenset[int]:
        return frozenset()

    @property
    def settled_after(self) -> int:
        return 0

    @property
    def optional_parts(self) -> frozenset[str]:
        return frozenset()

    @property
    def validates_first(self) -> bool:
        return False

    @property
    def has_average(self) -> bool:
        return False

    def event(self, step: int) -> str | None:
        return None

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        return None

    def parts(self) -> dict[str, Stateful]:
        return {"model": self.model}

    def export(self, path: Path) -> None:
        path.write_text(str(self.model.weight.item()))

    def draw(self, run: Run, step: int) -> None:
        self.calls.append(("draw", step))


class EvaluatedStage(ToyStage):
    """Its best weights are those of the lowest rFID, which every third step computes."""

    @property
    def criterion(self) -> Criterion:
        return Criterion("rfid", higher_is_better=False)

    @property
    def evaluation_interval(self) -> int:
        return 3
