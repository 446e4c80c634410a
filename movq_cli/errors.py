"""Errors that a command reports to its user; every layer can raise them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MovqError(Exception):
    """An error that the command line prints as one line, without a traceback.

    Args:
        message: Description of the error, which names the file, setting or option.
        hint: Sentence that says what to do next, often a command to type; empty if the message suffices.
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
    """The request cannot be carried out because of its usage, its settings or its input (exit code 2)."""

    exit_code = 2


class FailureError(MovqError):
    """The request was valid, but carrying it out failed, for example for lack of disk space (exit code 1)."""

    exit_code = 1


class InterruptedRunError(MovqError):
    """The user or the scheduler stopped the command, and its results so far are on disk (exit code 130)."""

    exit_code = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the CPU or of a GPU does not suffice."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "can't start new thread")
"""Texts of PyTorch about the memory of a GPU, and about that of the CPU on Linux and on Windows; and Python's about the
stack of a thread."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint that suggests the most similar known names, or lists known names if none is similar.

    A name that differs from a known one in case alone is the most similar one, and the only one that is suggested.

    Args:
        name: Name that the user typed.
        known: Valid names.

    Returns:
        A sentence for the hint of an error; empty if there are no valid names.
    """
    names = sorted(known)
    by_lower: dict[str, list[str]] = {}
    for candidate in names:
        by_lower.setdefault(candidate.lower(), []).append(candidate)
    lower = name.lower()
    keys = [lower] if lower in by_lower else difflib.get_close_matches(lower, by_lower, n=2, cutoff=0.6)
    near = [candidate for key in keys for candidate in by_lower[key]]
    if near:
        return f"Did you mean {' or '.join(map(repr, near[:2]))}?"
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    return f"Known: {', '.join(names[:_LISTED_NAMES])}{more}." if names else ""


_LISTED_NAMES = 30
"""Largest number of known names that a hint lists: a prior may have a thousand classes."""
