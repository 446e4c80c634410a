"""The one sink: results on stdout, everything else on stderr, progress for people and for job logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

SECONDS_BETWEEN_LINES = 30.0
"""Off a terminal a progress line is written this often, so that a job's log stays readable."""


_NOTHING: Mapping[str, str] = {}


class Progress(Protocol):
    """A running count towards a total."""

    def advance(self, count: int = 1, figures: Mapping[str, str] = _NOTHING) -> None:
        """Add to the count; figures (a loss, say) are shown with it, by name, until there are others."""


class Console:
    """Where a command speaks.

    Args:
        as_json: Results are one JSON object on stdout and nothing else.
        quiet: No log lines and no progress; warnings and results still appear.
        mute: Nothing at all: of several processes that do one command's work, one speaks.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, mute: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet or mute
        self.mute = mute

    def log(self, message: str) -> None:
        """One line about what is being done, on stderr."""
        if not self.quiet:
            self._line(message)

    def warn(self, message: str) -> None:
        """One line that the user should not miss, on stderr."""
        self._line(f"warning: {message}")

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """What the command was run for, on stdout.

        Args:
            data: The result as a JSON object, printed with `--json`.
            text: The same for people and pipes: a path, usually.
        """
        if self.mute:
            return
        sys.stdout.write((json.dumps(data, allow_nan=False) if self.as_json else text) + "\n")
        sys.stdout.flush()

    def table(self, data: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A result that is a table: Rich on a terminal, tab-separated in a pipe, JSON with `--json`."""
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
    def progress(self, total: int, what: str, unit: str, done: int = 0) -> Iterator[Progress]:
        """Progress with rate and ETA while the block runs: Rich on a terminal, plain lines elsewhere.

        Args:
            total: The count at the end.
            what: What is being done, e.g. "encoding".
            unit: What is counted, e.g. "images".
            done: The count at the start, for work that goes on where it was.
        """
        if self.quiet:
            yield _Silent()
        elif sys.stderr.isatty():
            with _rich(total, what, unit, done) as running:
                yield running
        else:
            with _plain(total, what, unit, done) as running:
                yield running

    def _line(self, message: str) -> None:
        if self.mute:
            return
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


class _Silent:
    def advance(self, count: int = 1, figures: Mapping[str, str] = _NOTHING) -> None:
        """Nothing to show."""


@contextmanager
def _rich(total: int, what: str, unit: str, done: int) -> Iterator[Progress]:
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
        """The bar, and below it the figures in as many columns as fit."""

        figures: Mapping[str, str] = _NOTHING

        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            if self.figures:
                yield Columns([f"[dim]{name}[/dim] {value}" for name, value in self.figures.items()], padding=(0, 3))

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
    task = bar.add_task(what, total=total, completed=done)

    class _Running:
        def advance(self, count: int = 1, figures: Mapping[str, str] = _NOTHING) -> None:
            bar.figures = figures or bar.figures
            bar.advance(task, count)

    with bar:
        yield _Running()


@contextmanager
def _plain(total: int, what: str, unit: str, done: int) -> Iterator[Progress]:
    from tqdm import tqdm

    bar = tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=f" {unit}",
        file=_Lines(sys.stderr),
        mininterval=SECONDS_BETWEEN_LINES,
        # Without a smaller interval tqdm's monitor would print early; one line a period is the promise.
        maxinterval=SECONDS_BETWEEN_LINES,
        miniters=1,
        bar_format="{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}, ETA {remaining}, {rate_fmt}]{postfix}",
        leave=True,
    )

    class _Running:
        def advance(self, count: int = 1, figures: Mapping[str, str] = _NOTHING) -> None:
            if figures:
                bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in figures.items()), refresh=False)
            bar.update(count)

    with bar:
        yield _Running()


class _Lines:
    """A stderr in which tqdm's carriage returns are line ends: a log file has no cursor to move."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return self.stream.write(line + "\n") if line else 0

    def flush(self) -> None:
        self.stream.flush()
