"""Handling of the signals that stop a command: SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP (a closed terminal).

Schedulers send SIGUSR1 shortly before the time of a job is over. All four mean the same: the command ends with one line
on stderr and with exit code 130. A command can be stopped at any moment, but an exception must not be raised at any
moment: an import that it ends would report another error, or swallow it. So `handle_from_start` does this:

- Before the function of a command runs, nothing has been made. The process then ends at once.
- While the function of a command runs, the signal raises `KeyboardInterrupt`, after the import that is in progress.
- While that exception ends the command, further signals are ignored, because launchers and terminals repeat signals. If
  the command has not ended after `PATIENCE_SECONDS`, another signal ends the process at once, which loses no result:
  all files are written completely or not at all.
- After the command, `ignore_from_end` lets the process exit undisturbed.

This module imports little, because it runs before everything else.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # `typing` takes 20 ms to import, in which no signal is handled yet.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""The signals that stop a command."""

EXIT_CODE = 130
"""Exit code of a command that a signal has stopped."""

PATIENCE_SECONDS = 2.0
"""Time during which further signals are ignored, because the command is ending."""

INTERRUPTED = "interrupted. Run the same command again: it resumes if there is something to resume."
"""Message of a command that is stopped at a moment for which it has no message of its own."""

_is_handled = False
"""Whether `handle_from_start` was called, so that the end of the command is the end of this process."""

_RETRY_SECONDS = 0.01
_COMMANDS = "movq_cli.commands."
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


def is_first_rank() -> bool:
    """Return whether this process speaks for its command: it is alone, or the first one of those of a launcher.

    RANK alone does not make it one of several: a shell may have the variable from another program.
    """
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def handle_from_start() -> None:
    """Handle the signals for the rest of this process; to be called before anything is imported that takes long."""
    global _is_handled  # noqa: PLW0603 - it describes the process
    _is_handled = True
    stop = _Stop(is_process=True)
    for number in _handled():
        signal.signal(number, stop)
    sys.unraisablehook = stop.on_unraisable


def ignore_from_end() -> None:
    """Ignore the signals from now on: the command has ended, and its exit code is known.

    A process in which `handle_from_start` was not called goes on after the command, so its handlers stay: processes
    that it forks later would inherit that they ignore SIGTERM, and could not be ended.
    """
    if not _is_handled:
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def blocked() -> Iterator[None]:
    """Block the signals during the block, in which processes are forked: they inherit this.

    A process that was forked without it would handle a signal as its parent does, until it has set its own handlers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """Ignore the signals in a process that was forked while they were `blocked`: its parent ends it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.unraisablehook = sys.__unraisablehook__
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def on_stop_signal(callback: Callable[[], None], *, launched: bool) -> Iterator[None]:
    """Call a function at the first of the signals during the block; a second signal has its usual effect.

    Args:
        callback: Function to call in the main thread; an exception from it is raised inside the block.
        launched: Whether a launcher started this process. Further signals are then ignored, because a launcher repeats
            the terminal's signals to its ranks, and kills them itself if they take too long.
    """
    previous = _previous_handlers()

    def handle_first(_number: int, _frame: FrameType | None) -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if launched else handler)
        callback()

    with _installed(handle_first, previous):
        yield


@contextmanager
def interruptible(results: str, *, launched: bool) -> Iterator[None]:
    """End the block at one of the signals with an error that says how to resume.

    Args:
        results: Description of the results that stay on disk, in the plural, such as "the images made".
        launched: Whether a launcher started this process. Further signals are then ignored, as by `on_stop_signal`.

    Raises:
        InterruptedRunError: The process received one of the signals.
    """
    from movq_cli.errors import InterruptedRunError

    previous = _previous_handlers()
    stop = _Stop(patience=math.inf if launched else PATIENCE_SECONDS)
    try:
        # Inside the block it is a KeyboardInterrupt, which no `except Exception` mistakes for an error of a file.
        with _installed(stop, previous):
            yield
    except KeyboardInterrupt:
        for handler in previous.values():
            if isinstance(handler, _Stop):
                handler.adopt(stop)
        message = f"interrupted; {results} so far are kept"
        raise InterruptedRunError(message, "Run the same command again to resume.") from None


class _Stop:
    """A signal handler that ends the command.

    Args:
        patience: Time in seconds during which further signals are ignored.
        is_process: Whether this is the handler of a process of the command line, which may be ended at once.
    """

    def __init__(self, *, patience: float = PATIENCE_SECONDS, is_process: bool = False) -> None:
        self.patience = patience
        self.is_process = is_process
        self.raised_at: float | None = None

    def __call__(self, _number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, now or later, or end the process; see the description of the module."""
        if self.raised_at is not None:
            if time.monotonic() - self.raised_at > self.patience:
                _end_process()
            return
        is_in_command, is_importing = _position(frame)
        if self.is_process and not is_in_command:
            _end_process()
        if is_importing:
            self._retry()
            return
        self.raised_at = time.monotonic()
        raise KeyboardInterrupt

    def adopt(self, inner: _Stop) -> None:
        """Take over from a handler of an inner block that has raised the exception."""
        self.raised_at = inner.raised_at or time.monotonic()
        self.patience = inner.patience

    def on_unraisable(self, unraisable: Any) -> None:  # noqa: ANN401 - the type of `sys.unraisablehook`'s argument
        """Raise the exception again if it was raised where Python discards it, as in a finalizer."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self.raised_at = None
            self._retry()
        else:
            sys.__unraisablehook__(unraisable)

    def _retry(self) -> None:
        handler = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGALRM, handler if isinstance(handler, _Stop) else self)
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)


def _position(frame: FrameType | None) -> tuple[bool, bool]:
    """Return whether the function of a command is running, and whether an import is in progress."""
    is_in_command = is_importing = False
    while frame is not None:
        code = frame.f_code
        name = str(frame.f_globals.get("__name__"))
        is_in_command = is_in_command or (name.startswith(_COMMANDS) and code.co_name != "<module>")
        is_importing = is_importing or code.co_filename == _IMPORT_SYSTEM
        frame = frame.f_back
    return is_in_command, is_importing


def _end_process() -> NoReturn:
    """End this process at once; of several ranks only the first one prints the line."""
    if is_first_rank():
        with suppress(OSError):
            os.write(2, f"error: {INTERRUPTED}\n".encode())
    os._exit(EXIT_CODE)


def _handled() -> list[signal.Signals]:
    """Return the signals that stop a command; `nohup` takes SIGHUP out."""
    return [
        number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]


def _previous_handlers() -> dict[signal.Signals, Any]:
    handlers = {number: signal.getsignal(number) for number in _handled()}
    return {number: signal.SIG_DFL if handler is None else handler for number, handler in handlers.items()}


@contextmanager
def _installed(handler: Callable[[int, FrameType | None], None], previous: dict[signal.Signals, Any]) -> Iterator[None]:
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
