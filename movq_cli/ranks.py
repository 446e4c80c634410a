"""The ranks of one run: processes joined by torch.distributed, each of which works on a share of all data.

Batches, validation splits and random numbers are those of the complete run. Each rank works on its contiguous share of
them, so that sums over the ranks are the sums that a single process would compute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store

from movq_cli.errors import InterruptedRunError

T = TypeVar("T")

POLL_SECONDS = 0.02
LAUNCHER_ENDED = "interrupted: the process that started these ranks has ended"


class LostRankError(RuntimeError):
    """Another rank has ended, or cannot be reached."""


class Machine(NamedTuple):
    """A machine on which ranks run; two launchers with files of their own count as two machines, even on one host."""

    host: str
    """Host name."""
    node: str
    """Index of the launcher's node, or the host name if the launcher gives no index."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the number of ranks; the default is a run of a single process."""

    rank: int = 0
    """Rank of this process, from 0; only rank 0 prints messages and writes files."""
    world_size: int = 1
    """Number of ranks."""
    machines: tuple[Machine, ...] = ()
    """Machine of each rank; empty for a single process."""
    store: Store | None = None
    """Key-value store of the launcher, which all ranks can reach; None for a single process."""
    launcher: int = field(default_factory=os.getppid)
    """Process id of the launcher, which started this process."""

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0

    @property
    def is_one_machine(self) -> bool:
        """Whether all ranks run on one machine, so that they see the same files."""
        return len(set(self.machines)) <= 1

    @property
    def local_world_size(self) -> int:
        """Number of ranks on this machine, including this one."""
        return self.machines.count(self.machines[self.rank]) if self.machines else 1

    def describe(self, rank: int) -> str:
        """Return a rank with the name of its host, for messages."""
        return f"rank {rank} on {self.machines[rank].host}" if self.machines else f"rank {rank}"

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
            raise InterruptedRunError(LAUNCHER_ENDED)

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
            time.sleep(POLL_SECONDS)
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
            InterruptedRunError: The launcher has ended.
            LostRankError: The counter was on another machine, whose launcher has ended.
        """
        if self._ranks.store is None:
            return count
        self._ranks.check_launcher()
        try:
            total = self._ranks.store.add("movq/counter", count)
        except RuntimeError:  # The store has ended with the launcher of rank 0.
            self._ranks.check_launcher()
            raise LostRankError from None
        before, self._last_total = self._last_total, total
        return total - before


SINGLE_PROCESS = Ranks()
"""The ranks of a run of a single process."""
