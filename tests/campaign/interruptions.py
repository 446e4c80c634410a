"""Kills, signals and full disks at operations on files: the same command, run again, gives what it would have given."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.campaign.forked import AtOperation, Outcome, full_disk_from, interrupt_at, kill_at, run
from tests.campaign.pipeline import COMMANDS, Command, copy_before, differences
from tests.campaign.result import Case

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interruptions(reference: Path, folder: Path, seed: int, per_command: int | None) -> Iterator[Case]:
    """Yield the result of each interruption of each command.

    Args:
        reference: Folder of the complete pipeline.
        folder: Path at which it was made, for copies of it.
        seed: Seed of the choice of operations and signals.
        per_command: Number of operations to choose from each command for each kind of interruption; None takes all.
    """
    rng = random.Random(seed)
    for command in COMMANDS:
        total = run(copy_before(reference, command, folder), *command.arguments).operations
        shutil.rmtree(folder)
        for kind in ("kill", "signal", "full disk"):
            numbers = range(1, total + 1)
            chosen = list(numbers) if per_command is None else sorted(rng.sample(numbers, min(per_command, total)))
            for number in chosen:
                yield _case(reference, folder, command, kind, number, rng)


def _case(reference: Path, folder: Path, command: Command, kind: str, number: int, rng: random.Random) -> Case:
    acts: dict[str, AtOperation] = {
        "kill": kill_at(number),
        "signal": interrupt_at(number, rng.choice(SIGNALS)),
        "full disk": full_disk_from(number),
    }
    copy = copy_before(reference, command, folder)
    first = run(copy, *command.arguments, at_operation=acts[kind])
    again = run(copy, *command.arguments)
    problems = [*_problems_of(first, kind), *differences(reference, copy, command.outputs)]
    if again.code != 0:
        problems.append(f"lost: the command fails when it is run again: {again.stderr.strip()[-300:]}")
    shutil.rmtree(copy)
    return Case(f"{kind} at operation {number} of {command.name}", problems)


def _problems_of(first: Outcome, kind: str) -> Iterator[str]:
    """Yield what is wrong with the end of the interrupted command; it may have ended before, or after its result."""
    if kind == "kill" and first.code in (0, -signal.SIGKILL):
        return
    if kind == "signal" and first.code not in (0, 130):
        yield f"unclear: exit code {first.code} after a signal: {first.stderr.strip()[-1500:]}"
    elif not first.is_clear:
        yield f"unclear: {first.stderr.strip()[-1500:]}"
