"""What a command tells its user when it cannot go on: a leaf, so that every layer may raise it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MovqError(Exception):
    """An error for the person at the keyboard, printed as one line without a traceback.

    Args:
        message: What was wrong and where, naming the file, setting or option.
        hint: What to do next, usually the command to type. Empty where the message says it all.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.message.rstrip('.')}. {self.hint}" if self.hint else self.message
        return " ".join(text.split())


class BadRequestError(MovqError):
    """What was asked for cannot be: usage, settings, or unusable input (exit code 2)."""

    exit_code = 2


class FailureError(MovqError):
    """The request was sound but carrying it out failed: disk, memory, numbers (exit code 1)."""

    exit_code = 1


class InterruptedRunError(MovqError):
    """The user or the scheduler asked to stop, and what was made so far has been kept (exit code 130)."""

    exit_code = 130


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known names as a question, or all of them where none is near.

    Args:
        name: What was typed.
        known: The names that would have been right.

    Returns:
        A sentence for an error's hint; empty where nothing is known.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(candidate) for candidate in near)}?"
    return f"Known: {', '.join(names)}." if names else ""
