"""Work on a stream of items in threads, a bounded number of items ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    ahead: int,
    start_thread: Callable[[], object] | None = None,
) -> Iterator[Result]:
    """Yield the result of each item, in the order of the items.

    Args:
        work: Function that is called in a thread with an item. What it raises is raised here, at the item's turn.
        items: The items. They are taken in the calling thread, at most `ahead` before the result that is yielded.
        threads: Number of threads.
        ahead: Number of items that are worked on or wait ready beyond the one that is yielded.
        start_thread: Function that each thread calls first.
    """
    with ThreadPoolExecutor(threads, "loader", start_thread) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
