"""The ranks of one run: processes joined by torch.distributed, each of which works on a share of all data.

Batches, validation splits and random numbers are those of the complete run. Each rank works on its contiguous share of
them, so that sums over the ranks are the sums that a single process would compute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from movq_cli import devices
from movq_cli.errors import BadRequestError, FailureError, InterruptedRunError, MovqError

T = TypeVar("T")

_POLL_SECONDS = 0.02
_LAUNCHER_ENDED = "interrupted: the process that started these ranks has ended"


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the number of ranks; the default is a run of a single process."""

    rank: int = 0
    """Rank of this process, from 0; only rank 0 prints messages and writes files."""
    world_size: int = 1
    """Number of ranks."""
    local_world_size: int = 1
    """Number of ranks on this machine, including this one."""
    store: Store | None = None
    """Key-value store of the launcher, which all ranks can reach; None for a single process."""
    launcher: int = field(default_factory=os.getppid)
    """Process id of the launcher, which started this process."""

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0

    @property
    def is_orphaned(self) -> bool:
        """Whether the launcher has ended, so that it can no longer end these ranks."""
        return self.world_size > 1 and os.getppid() != self.launcher

    def check_launcher(self) -> None:
        """Raise an error if the launcher has ended.

        Raises:
            InterruptedRunError: The launcher has ended.
        """
        if self.is_orphaned:
            raise InterruptedRunError(_LAUNCHER_ENDED)

    def share(self, count: int) -> slice:
        """Return this rank's share of `count` items; shares are contiguous and their sizes differ by at most one."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its mean over all ranks, and return it."""
        return self.sum(tensor).div_(self.world_size) if self.world_size > 1 else tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank; ranks exchange it through the CPU, without waiting for a GPU."""
        return bool(self.sum(torch.tensor(int(flag))))

    def wait(self, group: dist.ProcessGroup | None = None) -> None:
        """Wait until all ranks have called this; signals are handled during the wait.

        Args:
            group: Process group of all ranks, which sets the timeout; None uses the default group, with a timeout of
                half an hour.
        """
        if self.world_size == 1:
            return
        work = dist.all_reduce(torch.zeros(1), group=group, async_op=True)
        while not work.is_completed():
            time.sleep(_POLL_SECONDS)
        work.wait()

    def shared_counter(self) -> SharedCounter:
        """Return a counter to which all ranks can add."""
        return SharedCounter(self)

    def gather_rows(self, share: Tensor, indices: Tensor) -> Tensor:
        """Return rows of a table that is divided equally among the ranks.

        Args:
            share: This rank's rows [n, d]; the table is the concatenation of the shares of all ranks.
            indices: Indices [m] int64 of rows of the table, in [0, n x world_size), equal on all ranks.

        Returns:
            The rows [m, d], equal on all ranks.
        """
        local = indices - self.rank * len(share)
        is_local = (local >= 0) & (local < len(share))
        return self.sum(torch.where(is_local[:, None], share[local.clamp(0, len(share) - 1)], 0))

    def from_first(self, make: Callable[[], T]) -> T:
        """Call a function on rank 0 and return its result on all ranks."""
        box = [make() if self.is_first else None]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return cast(T, box[0])

    def all_gather(self, part: T) -> list[T]:
        """Return the objects of all ranks, in the order of the ranks."""
        parts: list[Any] = [part]
        if self.world_size > 1:
            parts = [None] * self.world_size
            dist.all_gather_object(parts, part)
        return parts

    @contextmanager
    def long_barrier(self) -> Iterator[Callable[[], None]]:
        """Create a barrier without a timeout, for work that may take some ranks hours longer than others.

        The default group of gloo gives up after half an hour. This barrier waits for a late rank, but fails at once if
        a rank has ended, because its connections are then closed.

        Yields:
            A function that returns once all ranks have called it; each rank calls it equally often.
        """
        if self.world_size == 1:
            yield lambda: None
            return
        group = dist.new_group(backend="gloo", timeout=_BARRIER_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        yield partial(self.wait, group)
        dist.destroy_process_group(group)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that backward passes give gradients that are means over all ranks."""
        return model if self.world_size == 1 else nn.parallel.DistributedDataParallel(model)


_BARRIER_TIMEOUT = timedelta(days=365)


class SharedCounter:
    """A counter to which all ranks add without waiting for each other.

    Args:
        ranks: Ranks that share the counter.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._last_total = 0

    def add(self, count: int) -> int:
        """Add to the counter, and return its growth over all ranks since this rank's last call.

        Raises:
            InterruptedRunError: The launcher, which stores the counter, has ended.
        """
        if self._ranks.store is None:
            return count
        self._ranks.check_launcher()
        try:
            total = self._ranks.store.add("movq/counter", count)
        except RuntimeError:  # The store has ended with the launcher.
            raise InterruptedRunError(_LAUNCHER_ENDED) from None
        before, self._last_total = self._last_total, total
        return total - before


SINGLE_PROCESS = Ranks()
"""The ranks of a run of a single process."""


def is_launched() -> bool:
    """Return whether torchrun, or a scheduler that sets the same variables, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined_ranks(device_name: str | None) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the ranks of this run, and select this rank's device; a process that was started alone is a single rank.

    When a rank fails, all ranks end. Only the first rank that fails raises its error. The others, which fail with the
    same error or lose their connection, end silently. If a rank was killed, its launcher reports it.

    Args:
        device_name: Name of the device, as for `devices.select`. With several ranks on CUDA, each one gets its own GPU.

    Yields:
        The ranks and this rank's device.

    Raises:
        BadRequestError: There is no such device.
    """
    if not is_launched():
        yield SINGLE_PROCESS, devices.select(device_name)
        return
    world = int(os.environ["WORLD_SIZE"])
    device = devices.select(device_name)
    if device.type == "cuda":
        device = devices.select(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(device)
    store, _, _ = next(rendezvous("env://"))
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_WORLD_SIZE", world)), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size)
        yield ranks, device
        dist.barrier()  # A rank that ended early would close the connections of those that still work.
        dist.destroy_process_group()
    except Exception as error:
        code = _silent_exit_code(error, store, ranks)
        if code is not None:
            raise SystemExit(code) from None
        raise


_LOST_PEER = ("Connection closed by peer", "Connection reset by peer")
"""Parts of gloo's error messages when another rank has ended."""

_FAILURE = "movq/failure"
"""Key of the first rank that failed, and its exit code."""

_INTERRUPTION_SECONDS = 5.0
"""Time in which all ranks must have handled a signal; a rank handles it when its current operation ends."""


def _silent_exit_code(error: Exception, store: Store, ranks: Ranks) -> int | None:
    """Return None if this rank is the one that reports its error, else the exit code with which it ends silently."""
    code = error.exit_code if isinstance(error, MovqError) else 1
    if any(words in str(error) for words in _LOST_PEER):
        return code
    failure = f"{ranks.rank} {code}"
    if ranks.is_orphaned:
        return None if ranks.is_first else code
    try:
        if isinstance(error, InterruptedRunError) and not _all_interrupted(store, ranks):
            return code
        first_failure = store.compare_set(_FAILURE, "", failure).decode()
    except RuntimeError:  # The launcher, which held the store, has ended.
        return None if ranks.is_first else code
    return None if first_failure == failure else int(first_failure.split()[1])


def _all_interrupted(store: Store, ranks: Ranks) -> bool:
    """Return whether all ranks were interrupted, as when the user stops the run.

    When a rank was killed, the launcher sends the same signal to the others, but the killed rank does not respond.
    """
    keys = [f"movq/interrupted/{number}" for number in range(ranks.world_size)]
    store.set(keys[ranks.rank], "")
    end = time.monotonic() + _INTERRUPTION_SECONDS
    while not store.check(keys) and not store.check([_FAILURE]):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


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
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="movq",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
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
