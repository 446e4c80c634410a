"""What a training run says of itself: JSON lines, TensorBoard events, and the figures beside the progress."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from movq_cli import devices
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.ranks import Ranks
from movq_cli.runs import Run, now
from movq_cli.settings import TrainSettings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DeviceMetrics = dict[str, Tensor]
"""Scalars on the device: of a step, means over this rank's share of the batch."""
Metrics = dict[str, float | list[float]]
"""What a validation gives; lists have a value a chunk."""

_RATE_KNOWN = 2
"""Log lines until throughput is told: the first one's has compilation and the filling of caches in it."""


@dataclass(frozen=True)
class Speed:
    """What the device would do if steps were nothing but matrix products."""

    steps_per_second: float

    @classmethod
    def measured(cls, tflop_per_step: float, device: torch.device, precision: str) -> Self:
        """From a step's arithmetic on one rank and the rate of the device, measured now."""
        return cls(devices.matrix_rate(device, precision) / max(tflop_per_step * 1e12, 1.0))


class Log:
    """Means of the metrics between log lines, kept on the device until a line is due.

    Args:
        run: Where rank 0 writes.
        console: For lines that people read.
        settings: Batch size, and whether TensorBoard is wanted.
        ranks: Whose means are taken together.
        steps: Of the whole run, for the time that is left.
        reference: What a rank's steps are held against; None = nothing.
    """

    def __init__(
        self, run: Run, console: Console, settings: TrainSettings, ranks: Ranks, steps: int, reference: Speed | None
    ) -> None:
        self.run = run
        self.console = console
        self.settings = settings
        self.ranks = ranks
        self.steps = steps
        self.reference = reference
        self.shown: dict[str, str] = {}
        """The last line's figures, to be shown beside the progress."""
        self._sums: DeviceMetrics = {}
        self._counts: Counter[str] = Counter()
        self._steps = 0
        self._lines = 0
        self._waited = 0.0
        self._since = time.perf_counter()
        self._events: SummaryWriter | None = None

    def __enter__(self) -> Self:
        if self.ranks.is_first and wants_tensorboard(self.settings.tensorboard):
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(self.run.events)
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def restart_clock(self) -> None:
        """Leave out the time since the last line: it went into a validation or a checkpoint."""
        self._since, self._waited = time.perf_counter(), 0.0

    def add(self, metrics: DeviceMetrics) -> None:
        """Count a step's metrics; the device is not waited for."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] += 1
        self._steps += 1

    def flush(self, step: int) -> None:
        """Write the line of the steps since the last one, if there were any. The host waits for the device."""
        if not self._steps:
            return
        sums = self.ranks.mean(torch.stack(list(self._sums.values()))).tolist()
        means = {name: value / self._counts[name] for name, value in zip(self._sums, sums, strict=True)}
        seconds = time.perf_counter() - self._since
        rate = self._steps * self.settings.batch_size / seconds
        speed = {"images_per_second": rate, "waiting_for_data": self._waited / seconds}
        if self.reference is not None:
            speed["share_of_matrix_rate"] = self._steps / seconds / self.reference.steps_per_second
        if torch.cuda.is_available():
            speed["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._write(step, {"training": means, **speed}, {**means, **speed})
        self.shown = {name: f"{value:.4g}" for name, value in means.items()}
        self.shown |= {"images/s": f"{rate:.0f}", "waiting for data": f"{speed['waiting_for_data']:.0%}"}
        if self.reference is not None:
            self.shown["of the matrix rate"] = f"{speed['share_of_matrix_rate']:.0%}"
        self._lines += 1
        if self._lines == _RATE_KNOWN:
            self._tell_speed(step, rate, speed.get("peak_memory_gib"))
        self._sums, self._counts, self._steps = {}, Counter(), 0
        self.restart_clock()

    def validation(self, step: int, figures: Metrics) -> None:
        """Write a validation's figures, and say them."""
        flat = {
            name if number is None else f"{name}/{number}": value
            for name, values in figures.items()
            for number, value in (enumerate(values) if isinstance(values, list) else [(None, values)])
        }
        self._write(step, {"validation": figures}, {f"validation/{name}": value for name, value in flat.items()})
        spoken = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float))
        self.console.log(f"step {step}: {spoken}")

    def _tell_speed(self, step: int, rate: float, memory: float | None) -> None:
        left = timedelta(seconds=round((self.steps - step) * self.settings.batch_size / rate))
        peak = "" if memory is None else f", {memory:.1f} GiB of GPU memory"
        self.console.log(f"step {step}: {rate:.1f} images/s, {left} to go without validation{peak}")

    def _write(self, step: int, record: dict[str, Any], scalars: dict[str, float]) -> None:
        if not self.ranks.is_first:
            return
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with self.run.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": now(), **record}) + "\n")
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)


def wants_tensorboard(setting: bool | None) -> bool:
    """Whether events are written: as the setting says, or without one where TensorBoard is installed.

    Raises:
        BadRequestError: It is asked for and not installed.
    """
    installed = find_spec("tensorboard") is not None
    if setting and not installed:
        raise BadRequestError(
            "tensorboard=true, but TensorBoard is not installed", "Install it: pip install 'movq[tensorboard]'."
        )
    return installed if setting is None else setting
