"""The processes of one run: joined by torch.distributed under torchrun, each with its share of every batch.

A batch, a validation split, a draw belong to the run as a whole: each rank works on its share in the order of the
ranks, and what is summed over the ranks is what one process alone would have had.
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

_SECONDS_BETWEEN_LOOKS = 0.02
_GONE = "interrupted: the process that started these ranks is gone"


@dataclass(frozen=True)
class Ranks:
    """Which process this is of how many; a run of one process is the default."""

    rank: int = 0
    """From 0; rank 0 alone speaks and writes files."""
    world_size: int = 1
    """How many."""
    local_world_size: int = 1
    """How many of them on this machine, this one included."""
    store: Store | None = None
    """Their launcher's, which all of them reach."""
    launcher: int = field(default_factory=os.getppid)
    """The process that started this one."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def is_orphaned(self) -> bool:
        """Whether the launcher of these ranks is gone, which can then no longer end them."""
        return self.world_size > 1 and os.getppid() != self.launcher

    def check_launcher(self) -> None:
        """Go on only while the launcher is there.

        Raises:
            InterruptedRunError: It is gone.
        """
        if self.is_orphaned:
            raise InterruptedRunError(_GONE)

    def share(self, count: int) -> slice:
        """This rank's part of `count` items: contiguous, in the order of the ranks, as even as can be."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks, in place."""
        return self.sum(tensor).div_(self.world_size) if self.world_size > 1 else tensor

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank; over the host's network, so that no GPU is waited for."""
        return bool(self.sum(torch.tensor(int(flag))))

    def wait(self, group: dist.ProcessGroup | None = None) -> None:
        """Until all ranks have come here; over the host's network, and open to signals all the while.

        Args:
            group: Of all ranks, with the patience that is wanted; None = the run's own, which has half an hour's.
        """
        if self.world_size == 1:
            return
        work = dist.all_reduce(torch.zeros(1), group=group, async_op=True)
        while not work.is_completed():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        work.wait()

    def shared_counter(self) -> SharedCounter:
        """A count that all ranks add to."""
        return SharedCounter(self)

    def gather_rows(self, share: Tensor, places: Tensor) -> Tensor:
        """Rows of a table of which each rank holds an equal share.

        Args:
            share: [n, d], this rank's rows; the table is the shares of all ranks one after the other.
            places: [m] int64 in [0, n x world), the same on every rank.

        Returns:
            [m, d], the same on every rank.
        """
        inside = places - self.rank * len(share)
        here = (inside >= 0) & (inside < len(share))
        return self.sum(torch.where(here[:, None], share[inside.clamp(0, len(share) - 1)], 0))

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank."""
        box = [make() if self.is_first else None]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return cast(T, box[0])

    def all_gather(self, part: T) -> list[T]:
        """What each rank has, in their order, on every rank."""
        parts: list[Any] = [part]
        if self.world_size > 1:
            parts = [None] * self.world_size
            dist.all_gather_object(parts, part)
        return parts

    @contextmanager
    def long_barrier(self) -> Iterator[Callable[[], None]]:
        """Where all ranks wait for each other after work of hours, of which one may have more than another.

        gloo gives up on a late rank after half an hour; here it is waited for, unless it has ended: its connections
        close then, and the others' wait with them.

        Yields:
            What each rank calls as often as the others do: it returns once all have called it.
        """
        if self.world_size == 1:
            yield lambda: None
            return
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(group, dist.ProcessGroup)
        yield partial(self.wait, group)
        dist.destroy_process_group(group)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module through which training calls a model: its gradients are then the mean over all ranks."""
        return model if self.world_size == 1 else nn.parallel.DistributedDataParallel(model)


_PATIENCE = timedelta(days=365)


class SharedCounter:
    """A count that all ranks add to, none waiting for another.

    Args:
        ranks: Whose.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._seen = 0

    def add(self, count: int) -> int:
        """Add to the count; by how much it has grown over all ranks since this rank last added.

        Raises:
            InterruptedRunError: The launcher, which keeps the count, is gone.
        """
        if self._ranks.store is None:
            return count
        self._ranks.check_launcher()
        try:
            now = self._ranks.store.add("movq/counter", count)
        except RuntimeError:  # the store went with it
            raise InterruptedRunError(_GONE) from None
        before, self._seen = self._seen, now
        return now - before


SINGLE_PROCESS = Ranks()
"""A run of one process."""


def is_launched() -> bool:
    """Whether torchrun, or a scheduler that speaks like it, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined_ranks(device: str | None) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks of this run and this rank's device; a process started alone is a run of one.

    When a rank fails, all end. The first to fail raises its error; the others, which fail alike or lose their peer, end
    without a word: of a rank that was killed, whoever started them tells.

    Args:
        device: A name as for `devices.select`. Of several ranks on CUDA each gets its own GPU.

    Raises:
        BadRequestError: There is no such device.
    """
    if not is_launched():
        yield SINGLE_PROCESS, devices.select(device)
        return
    world = int(os.environ["WORLD_SIZE"])
    where = devices.select(device)
    if where.type == "cuda":
        where = devices.select(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(where)
    store, _, _ = next(rendezvous("env://"))
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_WORLD_SIZE", world)), store)
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size)
        yield ranks, where
        dist.barrier()  # a rank that leaves early would close the connections of one that still works
        dist.destroy_process_group()
    except Exception as error:
        code = _code_of_another(error, store, ranks)
        if code is not None:
            raise SystemExit(code) from None
        raise


_LOST_PEER = ("Connection closed by peer", "Connection reset by peer")
"""What gloo says when another rank has ended."""

_FAILURE = "movq/failure"
"""Who failed first, and with which exit code."""

_SECONDS_FOR_THE_OTHERS = 5.0
"""A rank hears a signal when the operation that it is in ends."""


def _code_of_another(error: Exception, store: Store, ranks: Ranks) -> int | None:
    """None for the one rank that tells its error; for another one the exit code to end with."""
    code = error.exit_code if isinstance(error, MovqError) else 1
    if any(words in str(error) for words in _LOST_PEER):
        return code
    claim = f"{ranks.rank} {code}"
    if ranks.is_orphaned:
        return None if ranks.is_first else code
    try:
        if isinstance(error, InterruptedRunError) and not _all_interrupted(store, ranks):
            return code
        winner = store.compare_set(_FAILURE, "", claim).decode()
    except RuntimeError:  # the launcher, which held the store, is gone
        return None if ranks.is_first else code
    return None if winner == claim else int(winner.split()[1])


def _all_interrupted(store: Store, ranks: Ranks) -> bool:
    """Whether the user stopped the run; when a rank was killed, the launcher interrupts the rest in the same way."""
    keys = [f"movq/interrupted/{number}" for number in range(ranks.world_size)]
    store.set(keys[ranks.rank], "")
    end = time.monotonic() + _SECONDS_FOR_THE_OTHERS
    while not store.check(keys) and not store.check([_FAILURE]):
        if time.monotonic() > end:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return True


def launch(arguments: Sequence[str], processes: int, device: str | None) -> None:
    """Run `movq` with these arguments as several ranks on this machine, as torchrun would, and wait for them.

    Args:
        arguments: Of the command line; each process gets them, and finds in its environment which rank it is.
        processes: How many, one a GPU.
        device: As asked for: on the CPU there may be any number.

    Raises:
        BadRequestError: There are not as many GPUs.
        FailureError: A rank was killed.
        SystemExit: A rank failed; it has said why.
    """
    here = torch.cuda.device_count()
    if devices.select(device).type == "cuda" and processes > here:
        raise BadRequestError(f"{processes} GPUs asked for, but this machine has {here}", f"Set --gpus {here}.")
    if devices.select(device).type != "cuda" and device is None:
        raise BadRequestError("--gpus needs CUDA, which is not here", "For processes on the CPU add --device cpu.")
    _run_elastic(arguments, processes)


def _run_elastic(arguments: Sequence[str], processes: int) -> None:
    import logging
    import sys

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks speak for themselves; torch's own account of a failure is a page long.
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


_KILLED = "If the machine ran out of memory, set a smaller batch size. The same command goes on from what was kept."
