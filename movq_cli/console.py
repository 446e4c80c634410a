"""The output of all commands: results on stdout, everything else on stderr, progress for terminals and log files.

Names of files, classes and archive members come from elsewhere and may hold anything: sequences that a terminal acts
on, line ends, bytes that are not UTF-8, Rich's markup. Every text for people passes `printable` here, and Rich never
reads markup in it. JSON, and text that another program reads from stdout, are exact.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

SECONDS_BETWEEN_LINES = 30.0
"""Interval of progress lines if stderr is not a terminal, so that the log of a job stays readable."""

_LONGEST_LINE = 4000
"""Largest number of characters in a line for people; the middle of a longer one is left out."""

_NO_VALUES: Mapping[str, str] = {}


def printable(text: str, *, is_multiline: bool = False) -> str:
    r"""Return a text with escapes such as `\x1b` in place of the characters that a terminal would not print.

    These are control characters, characters that change the direction of the text, line separators, and surrogates,
    which stand for bytes that are not UTF-8.

    Args:
        text: Any text.
        is_multiline: Whether line ends and tabs remain, and lines may have any length.
    """
    if not text.isprintable():
        shown = "\n\t" if is_multiline else ""
        text = "".join(
            char if char.isprintable() or char in shown or unicodedata.category(char) == "Zs" else _escape(char)
            for char in text
        )
    if len(text) > _LONGEST_LINE and not is_multiline:
        text = f"{text[: _LONGEST_LINE // 2]} ... {text[-_LONGEST_LINE // 2 :]}"
    return text


def write_line(text: str) -> None:
    """Write a line for people to stderr."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


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
        """Write the result of the command to stdout; the text is exact unless stdout is a terminal.

        Args:
            data: Result as a JSON object, written with `--json`.
            text: Result as text, written otherwise; usually a path.
        """
        if self.mute:
            return
        if self.as_json:
            text = json.dumps(data, allow_nan=False)
        elif sys.stdout.isatty():
            text = printable(text, is_multiline=True)
        try:
            sys.stdout.write(text + "\n")
        except UnicodeEncodeError:  # a path with bytes that are not UTF-8, which another program needs as it is
            sys.stdout.flush()
            sys.stdout.buffer.write(f"{text}\n".encode(errors="surrogateescape"))
        sys.stdout.flush()

    def table(self, data: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table as the result: with Rich on a terminal, tab-separated elsewhere, as JSON with `--json`."""
        if self.mute or self.as_json or not sys.stdout.isatty():
            # A tab or a line end in a cell would be read as the end of the cell.
            self.result(data, "\n".join("\t".join(map(printable, row)) for row in [columns, *rows]))
            return
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for column in columns:  # Folded, because a path of which the end is left out cannot be copied.
            table.add_column(Text(printable(column)), overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        RichConsole().print(table)

    @contextmanager
    def progress(
        self, total: int, activity: str, unit: str, done: int = 0, *, brief: bool = False
    ) -> Iterator[Progress]:
        """Show progress with rate and remaining time during the block: with Rich on a terminal, else as plain lines.

        Args:
            total: Number of items in total.
            activity: Name of the work, such as "encoding".
            unit: Plural noun for the items, such as "images".
            done: Number of items already finished, for work that is resumed.
            brief: Whether the progress disappears at the end, and is no plain line if it takes only seconds. It may
                then be shown while another progress is.
        """
        if self.quiet:
            yield _NoProgress()
        elif sys.stderr.isatty():
            with _rich(total, activity, unit, done, brief) as running:
                yield running
        else:
            with _plain(total, activity, unit, done, brief) as running:
                yield running

    def _line(self, message: str) -> None:
        if not self.mute:
            write_line(message)


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode()


class _NoProgress:
    def advance(self, count: int = 1, values: Mapping[str, str] = _NO_VALUES) -> None:
        """Show nothing."""


@contextmanager
def _rich(total: int, activity: str, unit: str, done: int, brief: bool) -> Iterator[Progress]:
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
    from rich.text import Text

    class _Live(RichProgress):
        """The progress bar, with the values below it in as many columns as fit."""

        values: Mapping[str, str] = _NO_VALUES

        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            if self.values:
                cells = [
                    Text.assemble((printable(name), "dim"), " ", printable(value))
                    for name, value in self.values.items()
                ]
                yield Columns(cells, padding=(0, 3))

    bar = _Live(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=RichConsole(stderr=True),
        transient=brief,
    )
    task = bar.add_task(printable(activity), total=total, completed=done)

    class _Running:
        def advance(self, count: int = 1, values: Mapping[str, str] = _NO_VALUES) -> None:
            bar.values = values or bar.values
            bar.advance(task, count)

    with bar:
        yield _Running()


@contextmanager
def _plain(total: int, activity: str, unit: str, done: int, brief: bool) -> Iterator[Progress]:
    from tqdm import tqdm

    bar = tqdm(
        total=total,
        initial=done,
        desc=printable(activity),
        unit=f" {unit}",
        file=_Lines(sys.stderr),
        mininterval=SECONDS_BETWEEN_LINES,
        # tqdm's monitor thread would print additional lines after its default interval.
        maxinterval=SECONDS_BETWEEN_LINES,
        miniters=1,
        delay=SECONDS_BETWEEN_LINES if brief else 0,
        position=0,  # Without it, a bar inside another one moves the cursor, which a log file does not have.
        bar_format="{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}, ETA {remaining}, {rate_fmt}]{postfix}",
        leave=True,
    )

    class _Running:
        def advance(self, count: int = 1, values: Mapping[str, str] = _NO_VALUES) -> None:
            if values:
                text = ", ".join(f"{name} {value}" for name, value in values.items())
                bar.set_postfix_str(printable(text), refresh=False)
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
