"""The standard streams of the process, when they are closed or cannot be written."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def open_closed() -> None:
    """Open the null device for each standard stream that is closed, before another file gets its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It gets the smallest free number.
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode))  # noqa: SIM115, PTH123 - as long as the process


def survive_loss_of_stderr() -> None:
    """Discard from now on what stderr cannot take: a full disk, or a reader or a terminal that has gone.

    What is written to it is about the progress of the work, and must not end the work.
    """
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _LossyStream(sys.stderr)


class _LossyStream(io.TextIOWrapper):
    """A text stream that gets the null device when its file cannot be written.

    Args:
        original: Stream whose file is written; it stays open as long as this one.
    """

    def __init__(self, original: io.TextIOWrapper) -> None:
        super().__init__(original.buffer, original.encoding, original.errors, line_buffering=True)
        self.original: TextIO = original

    def write(self, text: str) -> int:
        """Write a text, and return its length whether it could be written or not."""
        try:
            return super().write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, or discard it."""
        try:
            super().flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):  # A slow reader can go on later.
            return
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)


def discard_unwritable() -> str | None:
    """Flush stdout and stderr; give the null device to one that cannot be written, and return its name.

    Otherwise Python would report at its exit that it cannot flush the rest.
    """
    failed: str | None = None
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            failed = failed or name
    return failed
