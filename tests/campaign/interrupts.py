"""Interrupts of real commands at random moments: each must end with exit code 130, one line, and nothing left over."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign.forked import run
from tests.campaign.pipeline import COMMANDS, copy_before, differences
from tests.campaign.result import Case

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LEFTOVERS = ("*.partial", "plan.json.*", "blocks", "begun.json", "*.images")
"""Patterns of what an interrupted command may leave, but not the same command that ran again to its end."""


@dataclass(frozen=True)
class Command:
    """A command line that is interrupted."""

    arguments: Sequence[str]
    """Arguments of `movq`."""
    seconds: float
    """Latest moment of an interrupt, seconds after the interpreter has started and the command handles signals."""
    earliest: float = 0.0
    """Earliest moment, seconds."""


@dataclass
class Outcome:
    """The counts of a number of interrupts."""

    interrupts: int = 0
    tracebacks: int = 0
    """Commands that printed a traceback, or an exception that was ignored."""
    wrong_exit_codes: int = 0
    """Commands with an exit code other than 130; 0 is right if the command had ended."""
    unclear: int = 0
    """Interrupted commands that did not print exactly one line with an error."""
    survivors: int = 0
    """Commands of which a process lived on after 5 seconds."""
    leftovers: int = 0
    """Files that were left after the same command had run to its end."""
    exit_codes: Counter[int] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    """Description of each problem."""

    @property
    def problems(self) -> int:
        """The number of all problems."""
        return self.tracebacks + self.wrong_exit_codes + self.unclear + self.survivors + self.leftovers


def interrupt(
    commands: Sequence[Command],
    count: int,
    *,
    folder: Path,
    seed: int,
    reset: Callable[[Command], None] = lambda _: None,
    finish: bool = True,
) -> Outcome:
    """Interrupt the commands in turn at random moments, and count the problems.

    Args:
        commands: Command lines to interrupt.
        count: Number of interrupts.
        folder: Working directory of the commands.
        seed: Seed of the moments, the signals and the receivers (the process, or its process group as by a terminal).
        reset: Function that is called before each interrupt, which may remove the results of a command.
        finish: Whether each command is run again to its end once at the end, and leftovers are counted.
    """
    rng, outcome = random.Random(seed), Outcome()
    for number in range(count):
        command = commands[number % len(commands)]
        reset(command)
        moment, stop = rng.uniform(command.earliest, command.seconds), rng.choice(SIGNALS)
        _interrupt_once(command, folder, moment, stop, outcome, to_group=rng.random() < 0.5)
    for command in commands if finish else ():
        done = _start(command, folder)
        errors = done.communicate(timeout=600)[1]
        if done.returncode:
            outcome.wrong_exit_codes += 1
            outcome.details.append(f"{command.arguments[0]} again: exit code {done.returncode}: {errors[-500:]}")
    if finish:
        found = [str(path) for pattern in LEFTOVERS for path in folder.rglob(pattern)]
        outcome.leftovers += len(found)
        outcome.details += [f"left over: {path}" for path in found]
    return outcome


def early_interrupts(reference: Path, folder: Path, seed: int, per_command: int) -> Iterator[Case]:
    """Yield the result of each interrupt of a command's first second, or of its first five seconds.

    Args:
        reference: Folder of the complete pipeline.
        folder: Path at which it was made, for copies of it.
        seed: Seed of the moments and the signals.
        per_command: Number of interrupts of each command.
    """
    for number in range(per_command):
        for index, command in enumerate(COMMANDS):
            seconds = 1.0 if (number + index) % 2 == 0 else 5.0
            copy = copy_before(reference, command, folder)
            stopped = Command(command.arguments, seconds)
            outcome = interrupt([stopped], 1, folder=copy, seed=hash((seed, number, index)), finish=False)
            kind = "left over" if outcome.survivors else "unclear"
            problems = [f"{kind}: {text}" for text in outcome.details]
            again = run(copy, *command.arguments)
            if again.code != 0:
                problems.append(f"lost: the command fails when it is run again: {again.stderr.strip()[-300:]}")
            problems += differences(reference, copy, command.outputs)
            shutil.rmtree(copy)
            yield Case(f"interrupt {number} of the first {seconds:.0f} s of {command.name}", problems)


def _start(command: Command, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "movq_cli", *command.arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _interrupt_once(
    command: Command, folder: Path, moment: float, stop: signal.Signals, outcome: Outcome, *, to_group: bool
) -> None:
    process = _start(command, folder)
    _wait_for_handlers(process)
    time.sleep(moment)
    had_ended = process.poll() is not None
    if not had_ended:
        (os.killpg if to_group else os.kill)(process.pid, stop)
    errors = process.communicate(timeout=120)[1]
    code = process.returncode
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    end = time.monotonic() + 5
    while (survives := _group_exists(process.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    problems = {
        "tracebacks": "Traceback" in errors or "Exception ignored" in errors or "Aborted" in errors,
        "wrong_exit_codes": code not in {0, 130} or (code == 0 and bool(lines)),
        "unclear": code == 130 and (len(lines) != 1 or not any(word in lines[0] for word in ("interrupt", "stopped"))),
        "survivors": survives,
    }
    outcome.interrupts += 1
    outcome.exit_codes[code] += 1
    for name, has_problem in problems.items():
        setattr(outcome, name, getattr(outcome, name) + has_problem)
    if any(problems.values()):
        names = ", ".join(name for name, has_problem in problems.items() if has_problem)
        to = "the group" if to_group else "the process"
        line = " ".join(command.arguments)
        outcome.details.append(f"{line}: {stop.name} to {to} at {moment:.2f} s: {names}, code {code}: {errors[-1500:]}")


def _wait_for_handlers(process: subprocess.Popen[str]) -> None:
    """Wait until a process handles SIGHUP, the last of the signals, which Python itself does not, or has ended."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = next((line for line in status.read_text().splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
        if int(caught.split()[1], 16) >> (signal.SIGHUP - 1) & 1:
            return
        time.sleep(0.001)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
