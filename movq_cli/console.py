"""The output of all commands: results on stdout, everything else on stderr, progress for terminals and log files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

SECONDS_BETWEEN_LINES = 30.0
"""Interval of progress lines if stderr is not a terminal, so that the log of a job stays readable."""


_NO_VALUES: Mapping[str, str] = {}


class Progress(Protocol):
    """A counter of finished items, which is displayed with its total."""

    def advance(self, count: int = 1, values: Mapping[str, str] = _NO_VALUES) -> None:
        """Add to the count; `values`, such as a loss, are shown beside it by name until new ones are given."""


class Console:
    """Writes the messages, the progress and the result of a command.

    Args:
        as_json: Whether the result is written as one JSON object instead of text.
        quiet: Whether to omit log lines and progress; warnings and results still appear.
        mute: Whether to write nothing at all, as on all ranks but the first.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, mute: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet or mute
        self.mute = mute

    def log(self, message: str) -> None:
        """Write a line about the progress of the work to stderr."""
        if not self.quiet:
            self._line(message)

    def warn(self, message: str) -> None:
        """Write a warning of one line to stderr."""
        self._line(f"warning: {message}")

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """Write the result of the command to stdout.

        Args:
            data: Result as a JSON object, written with `--json`.
            text: Result as text, written otherwise; usually a path.
        """
        if self.mute:
            return
        sys.stdout.write((json.dumps(data, allow_nan=False) if self.as_json else text) + "\n")
        sys.stdout.flush()

    def table(self, data: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table as the result: with Rich on a terminal, tab-separated elsewhere, as JSON with `--json`."""
        if self.mute or self.as_json or not sys.stdout.isatty():
            self.result(data, "\n".join("\t".join(row) for row in [columns, *rows]))
            return
        from rich.console import Console as RichConsole
        from rich.table import Table

        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        RichConsole().print(table)

    @contextmanager
    def progress(self, total: int, activity: str, unit: str, done: int = 0) -> Iterator[Progress]:
        """Show progress with rate and remaining time during the block: with Rich on a terminal, else as plain lines.

        Args:
            total: Number of items in total.
            activity: Name of the work, such as "encoding".
            unit: Plural noun for the items, such as "images".
            done: Number of items already finished, for work that is resumed.
        """
        if self.quiet:
            yield _NoProgress()
        elif sys.stderr.isatty():
            with _rich(total, activity, unit, done) as running:
                yield running
        else:
            with _plain(total, activity, unit, done) as running:
                yield running

    def _line(self, message: str) -> None:
        if self.mute:
            return
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


class _NoProgress:
    def advance(self, count: int = 1, values: Mapping[str, str] = _NO_VALUES) -> None:
        """Show nothing."""


@contextmanager
def _rich(total: int, activity: str, unit: str, done: int) -> Iterator[Progress]:
    from rich.columns import Columns
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    class _Live(RichProgress):
        """The progress bar, with the values below it in as many columns as fit."""

        values: Mapping[str, str] = _NO_VALUES

        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            if self.values:
                yield Columns([f"[dim]{name}[/dim] {value}" for name, value in self.values.items()], padding=(0, 3))

    bar = _Live(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=RichConsole(stderr=True),
    )
    task = bar.add_task(activity, total=total, completed=done)

    class _Running:
        def advance(self, count: int = 1, values: Mapping[str, str] = _NO_VALUES) -> None:
            bar.values = values or bar.values
            bar.advance(task, count)

    with bar:
        yield _Running()


@contextmanager
def _plain(total: int, activity: str, unit: str, done: int) -> Iterator[Progress]:
    from tqdm import tqdm

    bar = tqdm(
        total=total,
        initial=done,
        desc=activity,
        unit=f" {unit}",
        file=_Lines(sys.stderr),
        mininterval=SECONDS_BETWEEN_LINES,
        # tqdm's monitor thread would print additional lines after its default interval.
        maxinterval=SECONDS_BETWEEN_LINES,
        miniters=1,
        bar_format="{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}, ETA {remaining}, {rate_fmt}]{postfix}",
        leave=True,
    )

    class _Running:
        def advance(self, count: int = 1, values: Mapping[str, str] = _NO_VALUES) -> None:
            if values:
                bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in values.items()), refresh=False)
            bar.update(count)

    with bar:
        yield _Running()


class _Lines:
    """A stream that turns tqdm's carriage returns into line ends, because a log file has no cursor."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return self.stream.write(line + "\n") if line else 0

    def flush(self) -> None:
        self.stream.flush()
