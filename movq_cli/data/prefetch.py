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
    cost: Callable[[Item], int] = lambda _item: 0,
    budget: int = 0,
) -> Iterator[Result]:
    """Yield the result of each item, in the order of the items.

    Args:
        work: Function that is called in a thread with an item. What it raises is raised here, at the item's turn.
        items: The items. They are taken in the calling thread, at most `ahead` before the result that is yielded.
        threads: Number of threads.
        ahead: Number of items that are worked on or wait ready beyond the one that is yielded.
        start_thread: Function that each thread calls first.
        cost: Function that returns the cost of an item, such as the memory of its result.
        budget: Largest sum of the costs of the items that are worked on or wait ready. An item that costs more is
            worked on alone.
    """
    with ThreadPoolExecutor(threads, "loader", start_thread) as pool:
        waiting: deque[tuple[int, Future[Result]]] = deque()
        total = 0
        try:
            for item in items:
                added = cost(item)
                while waiting and total + added > budget:
                    total -= waiting[0][0]
                    yield waiting.popleft()[1].result()
                waiting.append((added, pool.submit(work, item)))
                total += added
                if len(waiting) > ahead:
                    total -= waiting[0][0]
                    yield waiting.popleft()[1].result()
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
