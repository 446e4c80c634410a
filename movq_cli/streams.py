"""The standard streams of the process, when they are closed or cannot be written."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def open_closed() -> None:
    """Open the null device for each standard stream that is closed, before another file gets its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It gets the smallest free number.
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode))  # noqa: SIM115, PTH123 - as long as the process


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
