"""The log of a training run: JSON lines, trackers such as TensorBoard, and the metrics beside the progress bar."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from movq_cli import devices, digested_lines
from movq_cli.console import Console
from movq_cli.ranks import Ranks
from movq_cli.runs import Run, now
from movq_cli.training import trackers
from movq_cli.training.trackers import Tracker
from movq_cli.training_settings import TrainSettings

DeviceMetrics = dict[str, Tensor]
"""Metrics of a step: scalar tensors on the device, means over this rank's share of the batch."""
Metrics = dict[str, float | list[float]]
"""Metrics of a validation, by name; a list has one value for each chunk, channel or bin."""

_THROUGHPUT_LINE = 2
"""The log line after which throughput is reported; the first one still includes compilation and cache filling."""


@dataclass(frozen=True)
class Speed:
    """The speed that a step would have if it ran at the device's rate of large matrix products."""

    steps_per_second: float

    @classmethod
    def measured(cls, tflop_per_step: float, device: torch.device, precision: str) -> Self:
        """Measure the device's rate and divide it by the arithmetic of one step on one rank (1e12 operations)."""
        return cls(devices.matrix_rate(device, precision) / max(tflop_per_step * 1e12, 1.0))


class Log:
    """Sums the metrics of the steps on the device, and writes their means whenever a log line is due.

    Args:
        run: Run folder, to which rank 0 writes the log.
        console: Console for the lines that people read.
        settings: Training settings, of which the batch size and the trackers are used.
        ranks: Ranks over which the metrics are averaged.
        steps: Number of steps of the complete run, from which the remaining time is estimated.
        reference: Speed with which the steps of one rank are compared; None omits the comparison.
        done: Number of steps that the run has done already.
        session: What this process is: its command, its device, the size of the model. It is written first, so that the
            log has a line for the start and for each resumption; None writes none.

    A log that cannot be written, as on a full disk, costs a warning and not the run.
    """

    def __init__(
        self,
        run: Run,
        console: Console,
        settings: TrainSettings,
        ranks: Ranks,
        steps: int,
        reference: Speed | None,
        done: int = 0,
        session: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.session = session
        self.console = console
        self.settings = settings
        self.ranks = ranks
        self.steps = steps
        self.reference = reference
        self.done = done
        self.shown: dict[str, str] = {}
        """The values of the last log line as text, by name, to show beside the progress bar."""
        self._sums: DeviceMetrics = {}
        self._counts: Counter[str] = Counter()
        self._steps = 0
        self._lines = 0
        self._waited = 0.0
        self._since = time.perf_counter()
        self._trackers: list[Tracker] = []
        self._has_lost_lines = False

    def __enter__(self) -> Self:
        for name in trackers.requested(self.settings) if self.ranks.is_first else ():
            try:
                self._trackers.append(trackers.start(name, self.run, self.done))
            except OSError as error:
                self._warn_of_lost(f"{self.run.events} cannot be written", error)
        if self.session is not None:
            self._write(self.done, {"session": self.session}, {})
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in list(self._trackers):
            with self._may_fail(tracker):
                tracker.close()

    def sync(self) -> None:
        """Write the events that are still in memory, so that none is missing before a checkpoint."""
        for tracker in list(self._trackers):
            with self._may_fail(tracker):
                tracker.flush()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that the block takes as time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def restart_clock(self) -> None:
        """Exclude the time since the last line, which a validation or a checkpoint took, from the throughput."""
        self._since, self._waited = time.perf_counter(), 0.0

    def add(self, metrics: DeviceMetrics) -> None:
        """Add the metrics of a step without waiting for the device."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] += 1
        self._steps += 1

    def flush(self, step: int) -> dict[str, float]:
        """Write the line for the steps since the last line, if there are any; the host waits for the device.

        Returns:
            The means of the metrics over these steps; empty without a step.
        """
        if not self._steps:
            return {}
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
        if self._lines == _THROUGHPUT_LINE:
            self._report_throughput(step, rate, speed.get("peak_memory_gib"))
        self._sums, self._counts, self._steps = {}, Counter(), 0
        self.restart_clock()
        return means

    def validation(self, step: int, metrics: Metrics, raw: Metrics | None = None) -> None:
        """Write the metrics of a validation to the log, and the scalar ones to the console.

        Args:
            step: Number of steps done.
            metrics: Metrics of the exported weights.
            raw: Metrics of the weights of the last step, if they were validated too.
        """
        record: dict[str, Any] = {"validation": metrics}
        scalars = {f"validation/{name}": value for name, value in _scalars(metrics)}
        if raw is not None:
            record |= {"validation_of_raw_weights": raw}
            scalars |= {f"validation_of_raw_weights/{name}": value for name, value in _scalars(raw)}
        self._write(step, record, scalars)
        text = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float))
        self.console.log(f"step {step}: {text}")
        if raw is not None:
            text = ", ".join(f"{name} {value:.4g}" for name, value in raw.items() if isinstance(value, float))
            self.console.log(f"step {step}, weights without average: {text}")

    def picture(self, step: int) -> None:
        """Give the run's picture of a step to the trackers."""
        path = self.run.picture(step)
        for tracker in list(self._trackers) if path.is_file() else ():
            with self._may_fail(tracker):
                tracker.picture(path, step)

    def _report_throughput(self, step: int, rate: float, memory: float | None) -> None:
        remaining = timedelta(seconds=round((self.steps - step) * self.settings.batch_size / rate))
        peak = "" if memory is None else f", {memory:.1f} GiB of GPU memory"
        self.console.log(f"step {step}: {rate:.1f} images/s, {remaining} left without validation{peak}")

    def _write(self, step: int, record: dict[str, Any], scalars: dict[str, float]) -> None:
        if not self.ranks.is_first:
            return
        line = digested_lines.encode({"step": step, "time": now(), **record})
        try:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            _append(self.run.log, line)
        except OSError as error:
            if not self._has_lost_lines:
                self.console.warn(
                    f"{self.run.log} cannot be written ({error.strerror}); the training goes on without it"
                )
            self._has_lost_lines = True
        for tracker in list(self._trackers) if scalars else ():
            with self._may_fail(tracker):
                tracker.scalars(scalars, step)

    @contextmanager
    def _may_fail(self, tracker: Tracker) -> Iterator[None]:
        """Use a tracker no more if the block fails."""
        try:
            yield
        except tracker.failure as error:
            self._trackers.remove(tracker)
            self._warn_of_lost(tracker.target, error)

    def _warn_of_lost(self, problem: str, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        self.console.warn(f"{problem} ({reason}); the training goes on without its events")


def _append(path: Path, line: bytes) -> None:
    """Append a line completely or not at all: the next one must not continue a part of it.

    Raises:
        OSError: The line cannot be written.
    """
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


def _scalars(metrics: Metrics) -> Iterator[tuple[str, float]]:
    """Yield the name and the value of each scalar; the elements of a list are numbered."""
    for name, values in metrics.items():
        if isinstance(values, list):
            yield from ((f"{name}/{index}", value) for index, value in enumerate(values))
        else:
            yield name, values
