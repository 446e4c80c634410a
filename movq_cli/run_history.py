"""The history of a run as its folder tells it: sessions, losses, validations, pictures. It needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from movq_cli import digested_lines
from movq_cli.errors import BadRequestError
from movq_cli.run_manifest import RunManifest
from movq_cli.runs import Run

Part = Literal["training", "validation", "validation_of_raw_weights"]

_LISTED = 20
"""Number of damaged lines that a message names."""

PARTS: tuple[Part, ...] = ("training", "validation", "validation_of_raw_weights")


@dataclass(frozen=True)
class Series:
    """The values of one metric by step, in the order of the steps."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(zip(self.steps, self.values, strict=True))

    def from_step(self, step: int) -> Series:
        """Return the part of the series from a step on."""
        return Series.of((at, value) for at, value in self if at >= step)

    @classmethod
    def of(cls, pairs: Iterator[tuple[int, float]]) -> Series:
        """Return the series of these steps and values."""
        listed = list(pairs)
        return cls(tuple(step for step, _ in listed), tuple(value for _, value in listed))


@dataclass(frozen=True)
class Session:
    """One process that trained the run: from its start, or a resumption, to its end."""

    step: int
    """Number of steps done at its start."""
    started: datetime
    ended: datetime
    """Time of the last line that it logged."""
    values: Mapping[str, Any]
    """Its command, device and more, as the log has them."""

    @property
    def command(self) -> str:
        """The command line; empty if it is not known."""
        words = self.values.get("command")
        return " ".join(map(str, words)) if isinstance(words, list) else ""

    @property
    def device(self) -> str:
        """The name of the device; empty if it is not known."""
        return str(self.values.get("device", ""))

    @property
    def ranks(self) -> int:
        """Number of processes that shared each batch."""
        ranks = self.values.get("ranks")
        return ranks if isinstance(ranks, int) else 1

    @property
    def hours(self) -> float:
        """Hours from its start to its last line."""
        return max(0.0, (self.ended - self.started).total_seconds()) / 3600


@dataclass(frozen=True)
class _Line:
    """A line of the log."""

    step: int
    time: datetime
    record: Mapping[str, Any]


@dataclass(frozen=True)
class RunHistory:
    """The content of a run folder, apart from that of weights and pictures."""

    run: Run
    manifest: RunManifest
    lines: tuple[_Line, ...] = field(repr=False)
    pictures: tuple[int, ...]
    """Steps of the pictures, in increasing order."""
    damaged_lines: tuple[int, ...] = ()
    """Numbers of the lines of the log, from 1, that are damaged and left out."""

    @classmethod
    def read(cls, folder: Path) -> RunHistory:
        """Read the history of a run.

        Raises:
            BadRequestError: The folder is not a run folder, or its manifest is damaged.
        """
        manifest = Run(folder, "vq").read()
        run = Run(folder, manifest.kind)
        files = run.picture(0).parent.glob("*.png")
        pictures = tuple(sorted(int(path.stem) for path in files if path.stem.isdecimal() and path.stem.isascii()))
        lines, damaged = _read_log(run.log)
        return cls(run, manifest, tuple(lines), pictures, tuple(damaged))

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.run.folder.resolve().name

    @property
    def damage(self) -> str | None:
        """The damage of the log in words, with a remedy; None if there is none."""
        if not self.damaged_lines:
            return None
        numbers = ", ".join(map(str, self.damaged_lines[:_LISTED]))
        more = ", ..." if len(self.damaged_lines) > _LISTED else ""
        count = len(self.damaged_lines)
        return f"{self.run.log} has {count} damaged lines, which are left out. Remove them: {numbers}{more}."

    @property
    def last_step(self) -> int:
        """Number of steps of the last line or checkpoint."""
        return max([self.manifest.step, *(line.step for line in self.lines)])

    def series(self, name: str, part: Part = "training", index: int | None = None) -> Series:
        """Return a metric by step; empty if the log does not have it.

        Args:
            name: Name of the metric; `images_per_second` and the other fields of a line count as metrics of training.
            part: Part of the log.
            index: Index into the values of a metric that is an array; None for a number.
        """
        return Series.of(self._values(name, part, index))

    def _values(self, name: str, part: Part, index: int | None) -> Iterator[tuple[int, float]]:
        for line in self.lines:
            values = line.record.get(part)
            if not isinstance(values, Mapping):
                continue
            value = values.get(name, line.record.get(name) if part == "training" else None)
            if index is not None:
                value = value[index] if isinstance(value, list) and index < len(value) else None
            if isinstance(value, int | float) and math.isfinite(value):
                yield line.step, float(value)

    def length(self, name: str) -> int:
        """Return the number of values of a validation metric that is an array; 0 if the log does not have it."""
        lengths = [len(line.record["validation"].get(name) or ()) for line in self._validations]
        return max(lengths, default=0)

    @property
    def _validations(self) -> list[_Line]:
        return [line for line in self.lines if isinstance(line.record.get("validation"), Mapping)]

    @cached_property
    def last_validation(self) -> dict[str, Any]:
        """The newest value of each validation metric."""
        merged: dict[str, Any] = {}
        for line in self._validations:
            merged |= line.record["validation"]
        return merged

    @cached_property
    def sessions(self) -> tuple[Session, ...]:
        """The processes that trained the run, oldest first; a log without their lines counts as one of them."""
        groups: list[tuple[Mapping[str, Any], list[_Line]]] = []
        for line in self.lines:
            values = line.record.get("session")
            if isinstance(values, Mapping) or not groups:
                groups.append((values if isinstance(values, Mapping) else {}, []))
            groups[-1][1].append(line)
        return tuple(Session(group[0].step, group[0].time, group[-1].time, values) for values, group in groups)

    @property
    def hours(self) -> float:
        """Hours of all sessions."""
        return sum(session.hours for session in self.sessions)

    @cached_property
    def discriminator_start(self) -> int | None:
        """Index of the first step with the adversarial loss; None without a discriminator, or if it is not known."""
        for session in reversed(self.sessions):
            if "discriminator_start" in session.values:
                start = session.values["discriminator_start"]
                return start if isinstance(start, int) else None
        train = self.manifest.settings.train_vq
        if self.manifest.kind != "vq" or train.adversarial_weight == 0:
            return None
        if "epoch" in str(train.discriminator_start):
            return None  # The log of this run does not have the number of steps of an epoch.
        return train.discriminator_step(self.manifest.steps, 0)

    @property
    def resumptions(self) -> tuple[int, ...]:
        """Numbers of steps at which the run was resumed."""
        return tuple(session.step for session in self.sessions[1:])

    @property
    def command(self) -> str:
        """The command line of the last session, or what would train this run."""
        known = [session.command for session in self.sessions if session.command]
        if known:
            return known[-1]
        if self.manifest.imported is not None:
            return f"movq import {self.manifest.imported.source}"
        kind = {"vq": "train-vq", "prior": "train-prior"}[self.manifest.kind]
        return f"movq {kind} --preset {self.manifest.preset}"


def _read_log(path: Path) -> tuple[list[_Line], list[int]]:
    """Return the lines of a log, and the numbers of the damaged ones; the half line of a killed process is none.

    Raises:
        BadRequestError: The file cannot be read.
    """
    lines: list[_Line] = []
    damaged: list[int] = []
    try:
        data = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise BadRequestError(f"{path}: {error.strerror or error}") from None
    texts = data.split(b"\n")
    for number, text in enumerate(texts, start=1):
        try:
            record = digested_lines.decode(text)
            time = datetime.fromisoformat(record["time"])
            if time.tzinfo is None:
                raise ValueError("a time without its zone")
            lines.append(_Line(int(record["step"]), time, record))
        except (ValueError, TypeError, LookupError):
            if number < len(texts):
                damaged.append(number)
    return lines, damaged
