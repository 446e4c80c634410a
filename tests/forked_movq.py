"""`movq` as a real process that is forked from a server, which has imported torch once for all tests.

A process that starts Python anew spends several seconds on imports, and most tests take less than that themselves. The
tests of the start-up, of the imports, and of signals in the first second start Python anew.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

# Imported for the processes, most of which would otherwise import them themselves.
import torch._dynamo

from movq_cli import __main__ as entry
from movq_cli import app  # noqa: F401
from movq_cli.commands import (  # noqa: F401
    check,
    evaluate,
    export,
    fill,
    import_weights,
    prepare,
    reconstruct,
    sample,
    train_prior,
    train_vq,
)


def context() -> ForkServerContext:
    """Return the context of processes that are forked from the server."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "tests.tiny_costs"])
    # The server looks for these modules in the folder in which it starts. In another one it would find torch-fidelity's
    # package `tests`.
    with contextlib.chdir(Path(__file__).parents[1]):
        forkserver.ensure_running()
    return server


class ForkedMovq:
    """A `movq` that is at work, with those methods of `subprocess.Popen` that the tests need."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], *, new_session: bool = False
    ) -> None:
        """Start the process.

        Args:
            arguments: Command-line arguments.
            folder: Working folder.
            environment: Environment of the process.
            new_session: Whether the process leads a process group of its own, as one that a shell has started does.
        """
        self.arguments = ["movq", *arguments]
        self._logs = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._logs.name) / name for name in ("stdout", "stderr")]
        passed = (list(arguments), folder, dict(environment), self._outputs, new_session)
        self._process = context().Process(target=_become_movq, args=passed)
        self._process.start()

    @property
    def pid(self) -> int:
        """The identifier of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative number of the signal that ended the process; None while it is at work."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for the end of the process, and return what it wrote to stdout and to stderr.

        Args:
            timeout: Time after which the process is killed, seconds.

        Raises:
            subprocess.TimeoutExpired: The process did not end in time.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        stdout, stderr = (output.read_text() if output.exists() else "" for output in self._outputs)
        return stdout, stderr


def run(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `movq` in a forked process, and return its exit code and its output.

    Args:
        arguments: Command-line arguments.
        folder: Working folder.
        environment: Environment of the process.
        timeout: Time after which the process is killed, seconds.

    Raises:
        subprocess.TimeoutExpired: The process did not end in time.
    """
    process = ForkedMovq(arguments, folder, environment)
    outputs = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.arguments, process.returncode, *outputs)


def redirect_streams(stdout: Path, stderr: Path) -> None:
    """Give this process files in place of stdout and stderr, and no input."""
    for number, output in ((1, stdout), (2, stderr)):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _become_movq(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    outputs: Sequence[Path],
    new_session: bool,
) -> None:
    if new_session:
        os.setsid()
    redirect_streams(*outputs)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = ["movq", *arguments]
    try:
        entry.main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without them.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
