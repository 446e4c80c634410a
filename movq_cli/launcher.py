"""The processes of several ranks: how they start, how they join, and which of them says why the run ended.

torchrun, a scheduler that sets the same environment variables, or `launch` starts the processes. Ranks of one machine
print one error together, so that the output of every machine says why its ranks have ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from movq_cli import devices
from movq_cli.cores import allowed_cores
from movq_cli.errors import BadRequestError, FailureError, InterruptedRunError, MovqError
from movq_cli.ranks import LAUNCHER_ENDED, POLL_SECONDS, SINGLE_PROCESS, LostRankError, Machine, Ranks

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables with which a launcher tells a process its rank, and how to reach the others."""


def is_launched() -> bool:
    """Return whether torchrun, or a scheduler that sets the same variables, started this process as one of several."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def starts_processes(gpus: int | None) -> bool:
    """Return whether this process has to start others, as `--gpus` says.

    Args:
        gpus: Value of `--gpus`; None if it is not given.

    Raises:
        BadRequestError: Another number of processes has been started already, so that `--gpus` has no effect.
    """
    if gpus is None or not is_launched():
        return gpus is not None
    started = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE"))
    if started is not None and started != str(gpus):
        raise BadRequestError(
            f"--gpus {gpus} has no effect: torchrun or a scheduler has started {started} processes", "Leave --gpus out."
        )
    return False


@contextmanager
def joined_ranks(device_name: str | None) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the ranks of this run, and select this rank's device; a process that was started alone is a single rank.

    When a rank fails or is lost, all ranks end, and one rank of each machine raises an error that says why. The others
    end silently.

    Args:
        device_name: Name of the device, as for `devices.select`. With several ranks on CUDA, each one gets its own GPU.

    Yields:
        The ranks and this rank's device.

    Raises:
        BadRequestError: There is no such device, or the launcher's environment variables cannot be used.
        FailureError: A rank has not joined in time, or was lost.
    """
    if not is_launched():
        yield SINGLE_PROCESS, devices.select(device_name)
        return
    ranks = _connect()
    try:
        ranks = replace(ranks, machines=_await_all(ranks))
        device = devices.select(device_name)
        if device.type == "cuda":
            device = devices.select(f"cuda:{_integer('LOCAL_RANK', 0)}")
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=ranks.store, rank=ranks.rank, world_size=ranks.world_size, timeout=_EXCHANGE_TIMEOUT
        )
        yield ranks, device
        dist.barrier()  # A rank that ended early would close the connections of those that still work.
        dist.destroy_process_group()
    except Exception as error:
        ending = _ending(error, ranks)
        if ending is error:
            raise
        raise ending from None


def _connect() -> Ranks:
    """Connect to the launcher's store, as the rank that the environment gives.

    Raises:
        BadRequestError: A variable is missing, or its value cannot be used.
        FailureError: The store cannot be reached.
    """
    given = [name for name in _REQUIRED if os.environ.get(name)]
    missing = [name for name in _REQUIRED if name not in given]
    if missing:
        raise BadRequestError(
            f"the environment says that this process is one of several, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set",
            "Start the processes with torchrun; or unset RANK and WORLD_SIZE to run this one alone.",
        )
    world = _integer("WORLD_SIZE", 1, smallest=1)
    rank = _integer("RANK", 0)
    port = _integer("MASTER_PORT", 0)
    for name, value, limit in (("RANK", rank, world), ("MASTER_PORT", port, 2**16)):
        if value >= limit:
            raise BadRequestError(f"the environment variable {name} is {value}, which must be less than {limit}")
    try:
        store, _, _ = next(rendezvous("env://", timeout=_JOIN_TIMEOUT))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        address = f"{os.environ['MASTER_ADDR']}:{port}"
        raise FailureError(
            f"rank {rank} of {world} cannot meet the other ranks at {address}: {reason}",
            "Check MASTER_ADDR and MASTER_PORT, and that every rank was started.",
        ) from None
    return Ranks(rank, world, store=store)


def _integer(name: str, default: int, smallest: int = 0) -> int:
    """Return the value of an environment variable, which is an integer of at least `smallest`.

    Raises:
        BadRequestError: It is no such integer.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < smallest:
        raise BadRequestError(
            f"the environment variable {name} is {text!r}, not an integer of at least {smallest}",
            "Start the processes with torchrun; or unset RANK and WORLD_SIZE to run this one alone.",
        )
    return int(text)


def _await_all(ranks: Ranks) -> tuple[Machine, ...]:
    """Wait until every rank has reached this, and return the machine of each rank.

    Raises:
        FailureError: A rank has not reached this in time.
    """
    store = ranks.store
    assert store is not None
    keys = [f"movq/machine/{rank}" for rank in range(ranks.world_size)]
    store.set(keys[ranks.rank], json.dumps(_this_machine(ranks.rank)))
    end = time.monotonic() + _JOIN_TIMEOUT.total_seconds()
    while not store.check(keys):
        ranks.check_launcher()
        if store.check([_FAILURE]):
            raise LostRankError
        if time.monotonic() > end:
            absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            raise FailureError(
                f"of {ranks.world_size} ranks, {', '.join(absent)} did not start within {_JOIN_TIMEOUT}",
                "See the output of their machines for the reason.",
            )
        time.sleep(POLL_SECONDS)
    return tuple(Machine(*json.loads(store.get(key))) for key in keys)


def _this_machine(rank: int) -> Machine:
    host, local = socket.gethostname(), _integer("LOCAL_WORLD_SIZE", 0)
    return Machine(host, os.environ.get("GROUP_RANK") or (str(rank // local) if local else host))


_JOIN_TIMEOUT = timedelta(minutes=10)
"""Time in which all ranks must have started; loading PyTorch from a slow file system may take minutes."""

_EXCHANGE_TIMEOUT = timedelta(minutes=30)
"""Time that a rank waits for another one that neither answers nor closes its connection.

NCCL's default is 10 minutes, after which it aborts the process. But rank 0 writes a checkpoint alone, which may take
longer.
"""


_LOST_CONNECTION = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "remote process exited")
"""Parts of the error messages of gloo and of NCCL when another rank has ended or does not respond."""

_FAILURE = "movq/failure"
"""Key of the first rank that failed, its exit code and its message, as JSON."""

_END_SECONDS = 5.0
"""Time in which all ranks must have ended; a rank handles a signal when its current operation ends."""


def _ending(error: Exception, ranks: Ranks) -> BaseException:
    """Return what this rank raises: an error, or SystemExit if another rank of this machine reports why the run ended.

    Args:
        error: Error of this rank. If it is a lost connection, the reason is that another rank has ended.
        ranks: Ranks of the run.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # The launcher would otherwise end this process before it has reported.
    reported = InterruptedRunError(LAUNCHER_ENDED) if _is_lost(error) and ranks.is_orphaned else error
    try:
        return _ending_with_store(reported, ranks)
    except RuntimeError:  # The store has ended, with the launcher of rank 0 or with rank 0 itself.
        own_store = _first_rank_has_store()
        if _is_lost(reported):
            lost = [rank for rank in range(ranks.world_size) if _is_elsewhere(rank, ranks)]
            reported = _lost(ranks, [0] if own_store else lost)
        others = range(1 if own_store else 0, ranks.rank)
        is_first = not ranks.machines or all(_is_elsewhere(rank, ranks) for rank in others)
        return reported if is_first else SystemExit(_exit_code(reported))


def _first_rank_has_store() -> bool:
    """Return whether the store is part of the process of rank 0, and not of its launcher, as with torchrun."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)


def _ending_with_store(error: Exception, ranks: Ranks) -> BaseException:
    store, rank = ranks.store, ranks.rank
    assert store is not None
    store.set(_ended(rank), "")
    # When a rank was killed, the launcher of its machine sends the others the signal with which a user stops the run.
    is_interrupted = isinstance(error, InterruptedRunError)
    missing = _await_ends(store, ranks, most=0 if is_interrupted else 1) if is_interrupted or _is_lost(error) else []
    is_killed = bool(missing) and not store.check([_FAILURE])
    if is_killed and os.environ.get("TORCHELASTIC_RUN_ID") == _RUN_ID:
        return SystemExit(_exit_code(error))  # `launch` reports which rank was killed.
    if _is_lost(error):
        error = _lost(ranks, missing) if is_killed else _reason(store, ranks) or _lost(ranks, [])
    else:
        if is_killed and isinstance(error, InterruptedRunError):
            names = ", ".join(map(ranks.describe, missing))
            error = InterruptedRunError(f"{error.message} (without {names}: lost, or not interrupted)", error.hint)
        store.compare_set(_FAILURE, "", json.dumps([rank, _exit_code(error), str(error)]))
    own = f"{rank} {_exit_code(error)}"
    reporter = store.compare_set(f"movq/reporter/{_this_machine(rank).node}", "", own).decode()
    store.set(_knows_reason(rank), "")
    if ranks.is_first and _first_rank_has_store():
        _await([_knows_reason(other) for other in range(ranks.world_size) if other not in missing], store)
    return error if reporter == own else SystemExit(int(reporter.split()[1]))


def _await_ends(store: Store, ranks: Ranks, most: int) -> list[int]:
    """Wait until at most `most` ranks have not ended or one has recorded its failure; return those that have not."""
    end = time.monotonic() + _END_SECONDS
    while True:
        missing = [rank for rank in range(ranks.world_size) if not store.check([_ended(rank)])]
        if len(missing) <= most or store.check([_FAILURE]) or time.monotonic() > end:
            return missing
        time.sleep(POLL_SECONDS)


def _await(keys: Sequence[str], store: Store) -> None:
    """Wait until the store has all keys, for a limited time."""
    end = time.monotonic() + _END_SECONDS
    while not store.check(list(keys)) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)


def _reason(store: Store, ranks: Ranks) -> MovqError | None:
    """Return the recorded failure of another rank as an error of this one; None if there is none."""
    if not store.check([_FAILURE]):
        return None
    rank, code, message = json.loads(store.get(_FAILURE))
    kinds = {kind.exit_code: kind for kind in (BadRequestError, InterruptedRunError)}
    return kinds.get(code, FailureError)(f"{ranks.describe(rank)} ended: {message}")


def _lost(ranks: Ranks, lost: Sequence[int]) -> FailureError:
    names = ", ".join(map(ranks.describe, lost)) or "another rank"
    return FailureError(
        f"the connection to {names} was lost: the process was killed, or its machine cannot be reached",
        "Run the same command again on all machines to resume.",
    )


def _is_elsewhere(rank: int, ranks: Ranks) -> bool:
    return bool(ranks.machines) and ranks.machines[rank] != ranks.machines[ranks.rank]


def _is_lost(error: Exception) -> bool:
    if isinstance(error, MovqError):
        return False
    return isinstance(error, LostRankError) or any(words in str(error) for words in _LOST_CONNECTION)


def _exit_code(error: Exception) -> int:
    return error.exit_code if isinstance(error, MovqError) else 1


def _ended(rank: int) -> str:
    """Return the key of a rank that has ended, for whatever reason except a kill."""
    return f"movq/ended/{rank}"


def _knows_reason(rank: int) -> str:
    """Return the key of a rank that needs the store no longer, because it knows why the run has ended."""
    return f"movq/knows/{rank}"


_RUN_ID = "movq"
"""Name by which the ranks of `launch` know that it started them."""


def launch(arguments: Sequence[str], processes: int, device_name: str | None) -> None:
    """Run `movq` with these arguments as several ranks on this machine, as torchrun would, and wait for them.

    Args:
        arguments: Command-line arguments for all processes; each one reads its rank from its environment.
        processes: Number of processes; on CUDA each one uses its own GPU.
        device_name: Name of the device that was requested; on the CPU there may be any number of processes.

    Raises:
        BadRequestError: There are not enough GPUs.
        FailureError: A rank was killed.
        SystemExit: A rank failed and has reported its error.
    """
    available = torch.cuda.device_count()
    is_cuda = devices.select(device_name).type == "cuda"
    if is_cuda and processes > available:
        raise BadRequestError(f"--gpus {processes}, but this machine has {available} GPUs", f"Set --gpus {available}.")
    if not is_cuda and device_name is None:
        raise BadRequestError(
            "--gpus needs CUDA, which is not available", "To start processes on the CPU, add --device cpu."
        )
    _run_elastic(arguments, processes)


def _run_elastic(arguments: Sequence[str], processes: int) -> None:
    import logging
    import sys

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks report their own errors; torch's report of a failure is a page long.
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, allowed_cores() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=_RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    # Of the signals that stop a command, torch passes all but this one on to the ranks.
    signal.signal(signal.SIGUSR1, lambda _number, _frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        elastic_launch(config, sys.executable)("-m", "movq_cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            raise SystemExit(failure.exitcode) from None
        raise FailureError(f"rank {rank} was ended by signal {-failure.exitcode}", _KILLED) from None
    except SignalException:
        raise SystemExit(130) from None


_KILLED = "If the machine ran out of memory, set a smaller batch size. Run the same command again to resume."
