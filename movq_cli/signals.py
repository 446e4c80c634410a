"""Handling of Ctrl-C (SIGINT) and SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from movq_cli.errors import InterruptedRunError


@contextmanager
def on_stop_signal(callback: Callable[[], None], *, launched: bool) -> Iterator[None]:
    """Call a function at the first Ctrl-C or SIGTERM during the block; a second signal has its usual effect.

    Args:
        callback: Function to call in the main thread; an exception from it is raised inside the block.
        launched: Whether a launcher started this process. Further signals are then ignored, because a launcher repeats
            the terminal's signals to its ranks, and kills them itself if they take too long.
    """
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle_first(_number: int, _frame: FrameType | None) -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if launched else handler)
        callback()

    for number in previous:
        signal.signal(number, handle_first)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(results: str, *, launched: bool) -> Iterator[None]:
    """End the block at Ctrl-C or SIGTERM with an error that says how to resume.

    Args:
        results: Description of the results that stay on disk, in the plural, such as "the images made".
        launched: Whether a launcher started this process, as for `on_stop_signal`.

    Raises:
        InterruptedRunError: The process received one of the signals.
    """

    def stop() -> NoReturn:
        raise InterruptedRunError(f"interrupted; {results} so far are kept", "Run the same command again to resume.")

    with on_stop_signal(stop, launched=launched):
        yield
