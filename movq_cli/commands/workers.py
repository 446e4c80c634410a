"""Numbered work in processes that die with this one, and one line where one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

from movq_cli.errors import FailureError, InterruptedRunError

_Result = TypeVar("_Result")


@contextmanager
def results(work: Callable[[int], _Result], count: int, workers: int) -> Iterator[Iterator[tuple[int, _Result]]]:
    """Numbers below `count` and what is made of each, in the order in which they are finished.

    Args:
        work: What is done; the processes fork with it.
        count: How often.
        workers: Processes; 0 and 1 work in this one.

    Raises:
        FailureError: A process was killed or ran out of memory.
    """
    if min(workers, count) <= 1:
        yield ((number, work(number)) for number in range(count))
        return
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, count), initializer=_start, initargs=(work,)) as pool:
        try:
            # All at once and before anything else: the processes fork here, while there is one thread.
            futures = {pool.submit(_do, number): number for number in range(count)}
            yield ((futures[future], future.result()) for future in as_completed(futures))
        except (BrokenProcessPool, MemoryError):
            remedy = "Finished shards are kept: run it again, with fewer --workers if memory was short."
            raise FailureError("a worker process was killed or out of memory", remedy) from None
        except (KeyboardInterrupt, InterruptedRunError):
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # else leaving the pool waits until each has finished its shard
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable[[int], Any]
"""A process's work, set once as it starts: with every number it would be pickled a thousand times."""


def _start(work: Callable[[int], Any]) -> None:
    global _work  # noqa: PLW0603 - the executor's initializer has no other way to hand something on
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A parent killed outright cannot end its workers, which would go on writing beside the next run's."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _do(number: int) -> Any:  # noqa: ANN401 - whatever the work gives
    return _work(number)
