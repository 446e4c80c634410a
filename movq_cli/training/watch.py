"""The watch over a validation: its progress, and its end if the training is to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from movq_cli.console import Console
from movq_cli.ranks import SINGLE_PROCESS, Ranks

T = TypeVar("T")


class StoppedValidationError(Exception):
    """The training is to stop, so that the validation has ended without a result."""


class Watch:
    """Shows the progress of a validation, and ends it if the training is to stop.

    Args:
        console: Console for the progress.
        ranks: Ranks that share the validation.
        stops: Function that returns whether this process is to stop.
    """

    def __init__(self, console: Console, ranks: Ranks, stops: Callable[[], bool]) -> None:
        self.console = console
        self.ranks = ranks
        self.stops = stops

    def batches(self, batches: Iterable[T], count: int, activity: str) -> Iterator[T]:
        """Yield a rank's batches.

        Args:
            batches: This rank's batches.
            count: Largest number of batches of a rank. Every rank must pass the same number, because before each batch
                all ranks agree whether they stop.
            activity: Name of the work, such as "validating".

        Raises:
            StoppedValidationError: A rank is to stop.
        """
        remaining = iter(batches)
        with self.console.progress(count, activity, "batches", brief=True) as progress:
            for _ in range(count):
                if self.ranks.any(self.stops()):
                    raise StoppedValidationError
                yield from islice(remaining, 1)  # A rank with fewer batches has none left in the last round.
                progress.advance()


UNWATCHED = Watch(Console(quiet=True), SINGLE_PROCESS, lambda: False)
"""The watch of a validation that shows no progress and is never stopped."""


def batch_count(images: int, batch_size: int, ranks: Ranks) -> int:
    """Return the largest number of batches that a rank gets, if each rank divides its share of images into batches."""
    return math.ceil(math.ceil(images / ranks.world_size) / batch_size)
