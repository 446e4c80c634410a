"""Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from movq_cli.errors import InterruptedRunError


@contextmanager
def on_stop_signal(act: Callable[[], None], *, launched: bool) -> Iterator[None]:
    """Do something at the first Ctrl-C or SIGTERM while the block runs; a second one ends the process as ever.

    Args:
        act: What to do, in the main thread; an exception that it raises comes up wherever the block is.
        launched: Further ones are ignored: a launcher repeats to its ranks what the terminal has sent them already, and
            kills them itself when they take too long.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def first(_number: int, _frame: FrameType | None) -> None:
        for known, handler in before.items():
            signal.signal(known, signal.SIG_IGN if launched else handler)
        act()

    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(kept: str, *, launched: bool) -> Iterator[None]:
    """End the block at Ctrl-C or SIGTERM as a command that can be gone on with.

    Args:
        kept: What is, in words.
        launched: As for `heard`.

    Raises:
        InterruptedRunError: One of the signals came.
    """

    def stop() -> NoReturn:
        raise InterruptedRunError(f"interrupted; {kept} so far are kept", "The same command makes the others.")

    with on_stop_signal(stop, launched=launched):
        yield
