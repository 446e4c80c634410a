"""Two ranks: one of them is killed; or they run on two nodes that share no folder, and read different files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.campaign.damage import DAMAGES, FREE
from tests.campaign.forked import AtOperation, Outcome, kill_at, kill_other_at, start
from tests.campaign.pipeline import COMMANDS, Command, copy_before, differences
from tests.campaign.result import Case
from tests.conftest import free_port

RANKED = ("train-vq", "train-prior", "sample", "sample to a zip", "evaluate")
"""Commands that run on several ranks."""

QUICK = ("sample", "evaluate")
"""Those of which a case takes a second."""

INPUTS = {
    "train-vq": ("tiny.yaml", "data"),
    "train-prior": ("tiny.yaml", "data", "vq"),
    "sample": ("prior",),
    "sample to a zip": ("prior",),
    "evaluate": ("data", "back", "vq"),
}
"""Files and folders that each command reads, of which a node may have another copy."""

_CLOSE = 0.05
"""Relative difference of the best scores of one and of two ranks, whose sums are rounded differently."""

_SECONDS = 240
"""Time after which a process counts as one that does not end."""


@dataclass(frozen=True)
class Reference:
    """What a command leaves that ran on two ranks of one machine without an interruption."""

    command: Command
    folder: Path
    operations: int
    """Number of operations on files of rank 0."""


def references(reference: Path, folder: Path, names: Sequence[str]) -> Iterator[Reference | Case]:
    """Yield for each command what it leaves on two ranks, and whether this is what it leaves on one.

    Args:
        reference: Folder of the complete pipeline.
        folder: Path at which it was made, for copies of it.
        names: Names of the commands.
    """
    for command in (command for command in COMMANDS if command.name in names):
        copy = copy_before(reference, command, folder)
        first, _ = _on_one_machine(copy, command)
        problems = [] if first.code == 0 else [f"lost: two ranks fail: {first.stderr.strip()[-1500:]}"]
        problems += _differences_of_one_and_two_ranks(reference, copy, command)
        yield Case(f"two ranks of {command.name}", problems)
        if first.code == 0:
            made = copy.rename(copy.with_name(f"two-ranks-{command.name.replace(' ', '-')}"))
            yield Reference(command, made, first.operations)
        else:
            shutil.rmtree(copy)


def lost_ranks(
    found: Sequence[Reference], reference: Path, folder: Path, seed: int, per_command: int | None
) -> Iterator[Case]:
    """Yield the result of each kill of a rank: the other one says so in one line, and the command can be repeated.

    Args:
        found: What the commands leave on two ranks.
        reference: Folder of the complete pipeline.
        folder: Path at which it was made, for copies of it.
        seed: Seed of the choice of operations.
        per_command: Number of moments to choose for each command and each victim; None takes each operation of rank 0.
    """
    rng = random.Random(seed)
    for expected in found:
        numbers = range(1, expected.operations + 1)
        for victim in (0, 1):
            count = len(numbers) if per_command is None else min(per_command, len(numbers))
            for number in sorted(rng.sample(numbers, count)):
                copy = copy_before(reference, expected.command, folder)
                outcomes = _on_one_machine(copy, expected.command, victim, number)
                problems = list(_problems_of_survivor(outcomes[1 - victim], outcomes[victim]))
                again, _ = _on_one_machine(copy, expected.command)
                if again.code != 0:
                    problems.append(f"lost: the command fails when it is run again: {again.stderr.strip()[-300:]}")
                problems += differences(expected.folder, copy, expected.command.outputs)
                shutil.rmtree(copy)
                yield Case(f"rank {victim} killed at operation {number} of {expected.command.name}", problems)


def nodes(
    found: Sequence[Reference], reference: Path, folder: Path, seed: int, per_command: int | None, *, torchrun: bool
) -> Iterator[Case]:
    """Yield the result of each command on two nodes without a shared folder.

    Node 0 must end with the result of two ranks of one machine, or both nodes must refuse it with one line each, which
    names the rank and the folder, and leave nothing. The files of node 1 are equal, or one of them is damaged.

    Args:
        found: What the commands leave on two ranks.
        reference: Folder of the complete pipeline.
        folder: Path at which it was made, for copies of it.
        seed: Seed of the damage.
        per_command: Number of damaged files of node 1 for each command; None takes each one.
        torchrun: Whether every other pair of nodes is started with torchrun; the others get its environment variables.
    """
    rng = random.Random(seed)
    number = 0
    for expected in found:
        read = _inputs(reference, expected.command)
        count = len(read) if per_command is None else min(per_command, len(read))
        for damaged in [None, *rng.sample(read, count)]:
            number += 1
            yield _on_two_nodes(expected, reference, folder, damaged, rng, torchrun=torchrun and number % 2 == 1)


def _on_two_nodes(
    expected: Reference, reference: Path, folder: Path, damaged: Path | None, rng: random.Random, *, torchrun: bool
) -> Case:
    """Return the result of a command on two nodes, of which node 1 may have a damaged copy of a file."""
    homes = [folder.with_name(f"node{node}") for node in (0, 1)]
    for home in homes:
        copy_before(reference, expected.command, home)
    name = "equal files"
    problems: list[str] = []
    if damaged is not None:
        kind, damage = rng.choice(list(DAMAGES.items()))
        path = homes[1] / damaged
        before = path.read_bytes()
        content = damage(before, rng)
        path.unlink() if content is None else path.write_bytes(content)
        name = f"{damaged} of node 1: {kind}"
        problems += _problems_of_nodes(expected, homes, damaged, torchrun=torchrun)
        path.write_bytes(before)
    problems += _problems_of_nodes(expected, homes, None, torchrun=torchrun)
    for home in homes:
        shutil.rmtree(home)
    return Case(f"two nodes, {expected.command.name}{', torchrun' if torchrun else ''}, {name}", problems)


def _problems_of_nodes(
    expected: Reference, homes: Sequence[Path], damaged: Path | None, *, torchrun: bool
) -> Iterator[str]:
    """Run a command on two nodes, and yield what is wrong with its end."""
    before = [_listing(home) for home in homes]
    outcomes = (_by_torchrun if torchrun else _by_environment)(homes, expected.command)
    left = [_listing(home) - files for home, files in zip(homes, before, strict=True)]
    if [outcome.code for outcome in outcomes] == [0, 0]:
        yield from differences(expected.folder, homes[0], expected.command.outputs)
    else:
        yield from _problems_of_refusal(outcomes, homes, damaged)
        if damaged is None:
            yield from (f"left over: {path} on node 0" for path in sorted(left[0]))
    yield from (f"left over: {path} on node 1" for path in sorted(left[1]))


def _problems_of_refusal(outcomes: Sequence[Outcome], homes: Sequence[Path], damaged: Path | None) -> Iterator[str]:
    """Yield what is wrong with the messages of nodes that have refused a command."""
    names = ["rank 1 on "] if damaged is None else ["rank 1 on ", damaged.name, str(damaged.parent)]
    for node, outcome in enumerate(outcomes):
        if outcome.code not in (1, 2) or not outcome.is_clear:
            yield f"unclear: node {node} ended with exit code {outcome.code}: {outcome.stderr.strip()[-1500:]}"
        elif not any(name in outcome.error_lines[0] for name in names):
            yield f"unclear: node {node} names neither the rank nor the file: {outcome.error_lines[0]}"
        elif damaged is None and str(homes[0]) not in outcome.error_lines[0]:
            yield f"unclear: node {node} does not name the folder: {outcome.error_lines[0]}"


def _problems_of_survivor(survivor: Outcome, victim: Outcome) -> Iterator[str]:
    """Yield what is wrong with the end of the rank that was not killed."""
    if victim.code != -signal.SIGKILL:
        yield f"unclear: the victim ended with exit code {victim.code}: {victim.stderr.strip()[-300:]}"
    elif survivor.code != 0 and (survivor.code != 1 or not survivor.is_clear):
        yield f"unclear: the other rank ended with exit code {survivor.code}: {survivor.stderr.strip()[-1500:]}"


def _differences_of_one_and_two_ranks(one: Path, two: Path, command: Command) -> Iterator[str]:
    """Yield an error if two ranks have made anything else than one; trainings may differ by the rounding of sums."""
    if not command.name.startswith("train"):
        yield from differences(one, two, command.outputs)
        return
    missing = [text for text in differences(one, two, command.outputs) if not text.startswith("unequal")]
    yield from missing
    run = Path(command.outputs[-1]) / "run.json"
    if missing or not (two / run).is_file():
        return
    before, after = (json.loads((root / run).read_text())["best_score"] for root in (one, two))
    if abs(after - before) > _CLOSE * abs(before):
        yield f"unequal: the best score is {after} on two ranks, but {before} on one"


def _on_one_machine(
    folder: Path, command: Command, victim: int | None = None, number: int = 0
) -> tuple[Outcome, Outcome]:
    """Run a command on two ranks of one machine; one of them may be killed at an operation of rank 0."""
    environment = _environment(port=free_port(), local=2)
    first = start(folder, *command.arguments, environment=environment | {"RANK": "1"}, name="-1")
    act: AtOperation | None = None
    if victim is not None:
        act = kill_at(number) if victim == 0 else kill_other_at(number, first.process)
    second = start(folder, *command.arguments, environment=environment | {"RANK": "0"}, at_operation=act)
    return second.wait(_SECONDS), first.wait(_SECONDS)


def _by_environment(homes: Sequence[Path], command: Command) -> list[Outcome]:
    """Run a command on two nodes whose environment variables are set as by a scheduler."""
    environment = _environment(port=free_port(), local=1)
    started = [
        start(home, *command.arguments, environment=environment | {"RANK": str(node)} | _home(home))
        for node, home in enumerate(homes)
    ]
    return [process.wait(_SECONDS) for process in started]


def _by_torchrun(homes: Sequence[Path], command: Command) -> list[Outcome]:
    """Run a command on two nodes that torchrun starts."""
    port = str(free_port())
    started = []
    logs = [home.with_name(f"{home.name}-logs") for home in homes]
    for node, home in enumerate(homes):
        shutil.rmtree(logs[node], ignore_errors=True)
        started.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)),
                    *("--master-addr", "127.0.0.1", "--master-port", port),
                    *("--redirects", "3", "--log-dir", str(logs[node])),
                    *("-m", "movq_cli", "--", *command.arguments),
                ],
                cwd=home,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])} | _home(home),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
    return [_outcome(process, folder) for process, folder in zip(started, logs, strict=True)]


def _outcome(launcher: subprocess.Popen[bytes], logs: Path) -> Outcome:
    """Return the end of the only rank of a node; torchrun writes its messages to a file."""
    launcher.wait(_SECONDS)
    stdout, stderr = (next(logs.rglob(f"{name}.log")).read_text(errors="replace") for name in ("stdout", "stderr"))
    return Outcome(launcher.returncode, stdout, stderr, operations=0)


def _environment(port: int, local: int) -> dict[str, str]:
    """Return the environment variables with which two ranks find each other.

    Args:
        port: Port of rank 0 on the loopback device.
        local: Number of ranks of each machine.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(local), **address}


def _home(folder: Path) -> dict[str, str]:
    """Return the environment variables that keep the caches of a node in its folder."""
    return {"XDG_CACHE_HOME": str(folder / "cache"), "TORCH_HOME": str(folder / "torch")}


def _inputs(reference: Path, command: Command) -> list[Path]:
    """Return the files that a command reads, relative to the folder of the pipeline."""
    made = set(command.outputs)
    found: list[Path] = []
    for name in INPUTS[command.name]:
        start_path = reference / name
        paths = start_path.rglob("*") if start_path.is_dir() else [start_path]
        relative = (path.relative_to(reference) for path in sorted(paths) if path.is_file() and path.name not in FREE)
        found += [path for path in relative if not made & {str(parent) for parent in path.parents}]
    return [path for path in found if "tensorboard" not in path.parts]


def _listing(folder: Path) -> set[Path]:
    """Return the files of a node, without its caches."""
    return {
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and not {"cache", "torch"} & set(path.relative_to(folder).parts)
    }
