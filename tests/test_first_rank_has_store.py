"""The store is part of the process of rank 0, unless torchrun has started it: rank 0 takes it along when it ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest
from torch._C._distributed_c10d import HashStore

from movq_cli import launcher
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.ranks import LostRankError, Machine, Ranks


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class LostStore(HashStore):
    """The store of a rank 0 that was killed."""

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("Broken pipe")


def test_the_second_rank_of_a_machine_reports_that_the_first_one_was_killed() -> None:
    machines = (Machine("a", "0"),) * 3
    ends = [launcher._ending(LostRankError(), Ranks(rank, 3, machines, LostStore())) for rank in (1, 2)]
    assert isinstance(ends[0], FailureError)
    assert ends[0].message.startswith("the connection to rank 0 on a was lost: the process was killed")
    assert isinstance(ends[1], SystemExit)
    assert ends[1].code == 1


def test_the_first_rank_ends_after_the_others_know_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    store, machines = HashStore(), (Machine("a", "0"),) * 2
    first, second = (Ranks(rank, 2, machines, store) for rank in (0, 1))
    error = BadRequestError("bad set")
    ended: list[BaseException] = []
    thread = threading.Thread(target=lambda: ended.append(launcher._ending_with_store(error, first)))
    thread.start()
    time.sleep(0.2)
    assert not ended
    assert isinstance(launcher._ending_with_store(LostRankError(), second), SystemExit)
    thread.join(2)
    assert ended == [error]


def test_the_first_rank_does_not_wait_for_others_whose_store_the_launcher_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_RANK", "0")
    error, begin = BadRequestError("bad set"), time.monotonic()
    ranks = Ranks(0, 2, (Machine("a", "0"),) * 2, HashStore())
    assert launcher._ending_with_store(error, ranks) is error
    assert time.monotonic() - begin < 1
