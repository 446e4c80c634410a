"""Work ahead in threads: in order, bounded, and without threads left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from movq_cli.data.prefetch import map_ahead


@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_results_keep_the_order_of_the_items_however_long_each_takes(count: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3 == 0))
        return item * item

    assert list(map_ahead(work, range(count), threads=4, ahead=6)) == [item * item for item in range(count)]


def test_no_more_items_are_taken_than_ahead_of_the_result() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(50):
            taken.append(item)
            yield item

    results = map_ahead(lambda item: item, items(), threads=2, ahead=5)
    for number in range(1, 20):
        next(results)
        assert len(taken) == number + 5


def test_an_error_is_raised_at_its_turn_and_leaves_no_thread() -> None:
    before = threading.active_count()

    def work(item: int) -> int:
        if item == 3:
            raise KeyError(item)
        return item

    results = map_ahead(work, range(100), threads=3, ahead=10)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)
    assert threading.active_count() == before


def test_closing_early_cancels_what_waits() -> None:
    before = threading.active_count()
    done: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.05)
        done.append(item)

    results = map_ahead(work, range(100), threads=1, ahead=50)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before and len(done) < 10
