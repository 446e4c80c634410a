"""`movq` as a real process that is forked from a server, which has imported torch once for all tests.

A process that starts Python anew spends several seconds on imports, and most tests take less than that themselves. The
tests of the start-up, of the imports and of signals start Python anew.
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
    server.set_forkserver_preload([__name__])
    # The server looks for this module in the folder in which it starts. In another one it would find torch-fidelity's
    # package `tests`.
    with contextlib.chdir(Path(__file__).parents[1]):
        forkserver.ensure_running()
    return server


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
    with tempfile.TemporaryDirectory() as logs:
        outputs = [Path(logs) / name for name in ("stdout", "stderr")]
        process = context().Process(target=_become_movq, args=(list(arguments), folder, dict(environment), outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["movq", *arguments], timeout)
        texts = [output.read_text() if output.exists() else "" for output in outputs]
        return subprocess.CompletedProcess(["movq", *arguments], process.exitcode, *texts)


def redirect_streams(stdout: Path, stderr: Path) -> None:
    """Give this process files in place of stdout and stderr, and no input."""
    for number, output in ((1, stdout), (2, stderr)):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _become_movq(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], outputs: Sequence[Path]
) -> None:
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
