"""Processes for numbered tasks: one that is killed ends them all, whatever the others wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import os, sys, time
from pathlib import Path
from movq_cli.commands.workers import results
from movq_cli.errors import FailureError

def work(number):
    Path(sys.argv[1], str(number)).write_text(str(os.getpid()))
    time.sleep(2 * number)

try:
    with results(work, 2, 2) as found:
        list(found)
except FailureError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


def test_a_killed_process_that_held_the_lock_of_the_queue_ends_the_work(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path], stderr=subprocess.PIPE, text=True)
    try:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        time.sleep(0.3)  # The process that has done task 0 now waits for another one, with the lock.
        os.kill(int((tmp_path / "0").read_text()), signal.SIGKILL)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 1
    assert error.startswith("a worker process was killed or ran out of memory")
