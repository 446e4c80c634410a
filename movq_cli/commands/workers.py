"""Numbered tasks in processes that end with this one; a killed process is reported in one line."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from movq_cli import signals
from movq_cli.errors import FailureError

_Result = TypeVar("_Result")


@contextmanager
def results(work: Callable[[int], _Result], count: int, workers: int) -> Iterator[Iterator[tuple[int, _Result]]]:
    """Run tasks in processes; the context is an iterator over their results.

    Args:
        work: Function that does a task, given its number from 0; the processes inherit it when they are forked.
        count: Number of tasks.
        workers: Number of processes; with 0 or 1 the tasks are done in this process.

    Yields:
        An iterator over pairs of a task's number and its result, in the order in which the tasks finish.

    Raises:
        FailureError: A process was killed or ran out of memory.
    """
    if min(workers, count) <= 1:
        yield ((number, work(number)) for number in range(count))
        return
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, count), initializer=_start, initargs=(work,)) as pool:
        try:
            # All tasks are submitted at once and first of all: the processes fork here, while there is one thread.
            with signals.blocked():
                futures = {pool.submit(_do, number): number for number in range(count)}
            yield ((futures[future], future.result()) for future in as_completed(futures))
        except (BrokenProcessPool, MemoryError):
            # A killed process may have held the lock of the pool's queue, for which the others then wait without end.
            _kill(set(multiprocessing.active_children()) - others)
            remedy = "Finished shards stay: run it again, with fewer --workers if there was too little memory."
            raise FailureError("a worker process was killed or ran out of memory", remedy) from None
        except KeyboardInterrupt:
            # Otherwise leaving the pool would wait until each process has finished its shard.
            _kill(set(multiprocessing.active_children()) - others)
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _kill(processes: Iterable[BaseProcess]) -> None:
    """Kill processes, which ignore the signal by which the pool ends them."""
    for process in processes:
        process.kill()


_work: Callable[[int], Any]
"""The function of a worker process, set once when it starts: sent with every task, it would be pickled each time."""


def _start(work: Callable[[int], Any]) -> None:
    global _work  # noqa: PLW0603 - the executor's initializer has no other way to store something
    _work = work
    signals.leave_to_parent()
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process when its parent ends: a killed parent cannot do it, and its workers would go on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _do(number: int) -> Any:  # noqa: ANN401 - the result of any function
    return _work(number)
