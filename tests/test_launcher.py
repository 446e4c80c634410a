"""How ranks join and end: unusable environments are refused, and each machine says why its ranks have ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from movq_cli import launcher
from movq_cli.errors import BadRequestError, FailureError, InterruptedRunError, MovqError
from movq_cli.launcher import joined_ranks
from movq_cli.ranks import Machine, Ranks
from tests.conftest import free_port

TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**TWO, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({**TWO, "RANK": "x"}, "RANK is 'x', not an integer of at least 0"),
        ({**TWO, "RANK": "-1"}, "RANK is '-1', not an integer of at least 0"),
        ({**TWO, "RANK": "2"}, "RANK is 2, which must be less than 2"),
        ({**TWO, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not an integer of at least 1"),
        ({**TWO, "WORLD_SIZE": "1.5"}, "WORLD_SIZE is '1.5', not an integer of at least 1"),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', not an integer"),
        ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT is 65536, which must be less than 65536"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused_in_one_line(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TWO:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadRequestError, match=re.escape(message)), joined_ranks("cpu"):
        pass
    for name in ("RANK", "WORLD_SIZE"):  # the remedy
        monkeypatch.delenv(name, raising=False)
    with joined_ranks("cpu") as (ranks, _):
        assert ranks.world_size == 1


# --- which rank reports, on a store of one process --------------------------------------------------------------------


def ranks_of(machines: str) -> list[Ranks]:
    """Return the ranks of machines, of which each has a letter."""
    store = HashStore()
    places = tuple(Machine(letter, letter) for letter in machines)
    return [Ranks(rank, len(machines), places, store) for rank in range(len(machines))]


def ending(error: Exception, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return how a rank ends, as its exit code and its message."""
    monkeypatch.setenv("GROUP_RANK", ranks.machines[ranks.rank].node)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    result = launcher._ending(error, ranks)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if isinstance(result, SystemExit):
        return f"{result.code}: "
    assert isinstance(result, MovqError)
    return f"{result.exit_code}: {result}"


LOST = RuntimeError("[/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:1: Connection reset by peer")


def test_one_rank_of_each_machine_says_which_rank_failed_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ranks_of("aabb")
    said = [
        ending(error, ranks[rank], monkeypatch)
        for rank, error in [(2, BadRequestError("bad set", "Copy it.")), (3, LOST), (1, LOST), (0, LOST)]
    ]
    assert said == ["2: bad set. Copy it.", "2: ", "2: rank 2 on b ended: bad set. Copy it.", "2: "]


def test_an_error_of_all_ranks_is_said_once_on_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [ending(FailureError("weights differ"), ranks, monkeypatch) for ranks in ranks_of("aabb")]
    assert said == ["1: weights differ", "1: ", "1: weights differ", "1: "]


def test_the_rank_that_did_not_end_is_said_to_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ending(LOST, ranks_of("ab")[0], monkeypatch)
    assert said.startswith("1: the connection to rank 1 on b was lost: the process was killed, or its machine cannot")


def test_a_lost_store_is_said_to_be_a_lost_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class LostStore(HashStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Broken pipe")

    ranks = [Ranks(of.rank, 3, of.machines, LostStore()) for of in ranks_of("abb")]
    assert ending(LOST, ranks[1], monkeypatch).startswith("1: the connection to rank 0 on a was lost")
    assert ending(LOST, ranks[2], monkeypatch) == "1: "


def test_ranks_that_a_user_stops_say_so_and_one_that_is_stopped_alone_names_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher, "_END_SECONDS", 0.1)
    stopped = InterruptedRunError("stopped", "Resume.")
    both = ranks_of("ab")
    assert both[0].store is not None
    both[0].store.set(launcher._ended(1), "")
    assert ending(stopped, both[0], monkeypatch) == "130: stopped. Resume."
    first, second = ranks_of("ab")
    assert ending(stopped, first, monkeypatch) == (
        "130: stopped (without rank 1 on b: lost, or not interrupted). Resume."
    )
    assert ending(LOST, second, monkeypatch).startswith("130: rank 0 on a ended: stopped (without rank 1")


# --- real processes ---------------------------------------------------------------------------------------------------

WORKER = """
import os, signal
from movq_cli.errors import MovqError
from movq_cli.launcher import joined_ranks
try:
    with joined_ranks("cpu") as (ranks, _):
        ranks.wait()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.wait()
except MovqError as error:
    print(error.exit_code, error)
"""


@pytest.mark.processes
def test_the_survivor_of_two_real_ranks_ends_at_once_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "worker.py"],
            cwd=tmp_path,
            env={
                **os.environ,
                **TWO,
                "RANK": str(rank),
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_PORT": port,
                "PYTHONPATH": str(Path(launcher.__file__).parents[1]),
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    out, errors = processes[0].communicate(timeout=120)
    processes[1].wait(60)
    assert re.fullmatch(r"1 the connection to rank 1 on \S+ was lost: [^\n]* to resume\.\n", out), out + errors
    assert errors == ""
