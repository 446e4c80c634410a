"""Runs `movq` in forked processes: torch is imported once, so that a run takes as long as its work alone.

A child can be killed, or refused space, at any of its operations on files: an audit hook of Python counts them.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from movq_cli import __main__ as entry
from tests import tiny_costs  # noqa: F401  # computed once for all children
from tests.forked_movq import redirect_streams  # It also imports what the commands need.

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = frozenset({"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate"})


@dataclass(frozen=True)
class Outcome:
    """The end of a process."""

    code: int
    """Exit code; the negative number of the signal that killed the process."""
    stdout: str
    stderr: str
    operations: int
    """Number of operations that changed files below the working folder, those of a killed process included."""

    @property
    def error_lines(self) -> list[str]:
        """The lines of the error message, without messages of the log."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]

    @property
    def is_clear(self) -> bool:
        """Whether the process succeeded, or said in one line what was wrong; a traceback is not clear."""
        is_internal = "Traceback" in self.stderr or "unexpected" in self.stderr or "Exception ignored" in self.stderr
        return not is_internal and (self.code == 0 or (self.code in (1, 2, 130) and len(self.error_lines) == 1))


AtOperation = Callable[[int, str], None]
"""Function that is called before each operation on files, with its number and the path."""


def kill_at(number: int) -> AtOperation:
    """Return a function that kills the process before one of its operations."""

    def act(count: int, _path: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def kill_other_at(number: int, process: int) -> AtOperation:
    """Return a function that kills another process before one of the operations."""

    def act(count: int, _path: str) -> None:
        if count == number:
            os.kill(process, signal.SIGKILL)

    return act


def interrupt_at(number: int, signal_number: int) -> AtOperation:
    """Return a function that sends the process a signal before one of its operations."""

    def act(count: int, _path: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal_number)

    return act


def full_disk_from(number: int) -> AtOperation:
    """Return a function that makes an operation and all later ones fail, as on a full disk."""

    def act(count: int, path: str) -> None:
        if count >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    return act


@dataclass(frozen=True)
class Child:
    """A forked process that runs `movq`."""

    process: int
    """Its process id."""
    logs: tuple[Path, ...]
    """Files of its output, its messages, and one byte for each of its operations on files."""

    def wait(self, seconds: float = 600) -> Outcome:
        """Wait for the end of the process, and return it; a process that does not end in time is killed."""
        end = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > end:
                os.kill(self.process, signal.SIGKILL)
                end += seconds
            time.sleep(0.005)
        stdout, stderr, operations = (log.read_text(errors="replace") for log in self.logs)
        return Outcome(os.waitstatus_to_exitcode(status), stdout, stderr, len(operations))


def run(
    folder: Path,
    *arguments: str,
    at_operation: AtOperation | None = None,
    file_limit: int | None = None,
) -> Outcome:
    """Run `movq` in a forked process.

    Args:
        folder: Working folder of the process.
        arguments: Arguments of the command line.
        at_operation: Function that is called before each operation that changes files below the folder.
        file_limit: Largest size of a file that the process may write, bytes; larger writes fail as on a full disk.
    """
    return start(folder, *arguments, at_operation=at_operation, file_limit=file_limit).wait()


def start(
    folder: Path,
    *arguments: str,
    at_operation: AtOperation | None = None,
    file_limit: int | None = None,
    environment: Mapping[str, str] | None = None,
    name: str = "",
) -> Child:
    """Start `movq` in a forked process, as `run` does.

    Args:
        folder: Working folder of the process.
        arguments: Arguments of the command line.
        at_operation: Function that is called before each operation that changes files below the folder.
        file_limit: Largest size of a file that the process may write, bytes.
        environment: Environment variables to add.
        name: Part of the names of its logs, which differs between processes of the same folder.
    """
    logs = tuple(folder.parent / f"{folder.name}{name}.{kind}" for kind in ("stdout", "stderr", "operations"))
    for log in logs:
        log.write_bytes(b"")
    child = os.fork()
    if child == 0:
        os.environ.update(environment or {})
        _run_in_child(folder, arguments, logs, at_operation, file_limit)
    return Child(child, logs)


def _run_in_child(
    folder: Path, arguments: Sequence[str], logs: Sequence[Path], at_operation: AtOperation | None, limit: int | None
) -> None:
    """Become `movq`; this does not return."""
    try:
        os.setsid()
        redirect_streams(*logs[:2])
        operations = os.open(logs[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(folder)
        torch.set_num_threads(1)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        _watch(folder, operations, at_operation)
        sys.argv = ["movq", *arguments]
        entry.main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _watch(folder: Path, log: int, at_operation: AtOperation | None) -> None:
    """Count the operations that change files below a folder, and call a function before each of them."""
    count = 0
    root = str(folder)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = arguments
            changes = bool(int(flags) & _WRITES) if isinstance(flags, int) else False
            changes = changes or (isinstance(mode, str) and bool(set(mode) & set("wxa+")))
            paths = [path]
        elif event in _CHANGES:
            changes, paths = True, list(arguments[:2])
        else:
            return
        if not changes or not any(_is_below(path, root) for path in paths):
            return
        count += 1
        os.write(log, b".")
        if at_operation is not None:
            at_operation(count, str(paths[0]))

    sys.addaudithook(hook)


def _is_below(path: object, root: str) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.fsdecode(path)
    return os.path.join(os.getcwd(), text).startswith(root + os.sep)  # noqa: PTH109, PTH118 - a hook must be quick
