"""What decodings share, and when it is forgotten. That graphs do what steps do, test_cuda.py says."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import torch
from torch import nn

from movq_cli.models.cuda_graphs import GraphRecorder


def test_what_is_shared_is_made_once_for_a_key_while_the_weights_stay_where_they_are() -> None:
    recorder, layer = GraphRecorder(), nn.Linear(3, 3)

    def kept(key: object) -> list[int]:
        return recorder.reuse(key, layer.parameters(), list)

    first = kept(("a", 2))
    assert kept(("a", 2)) is first
    layer.weight.data.mul_(2)  # a step of training
    assert kept(("a", 2)) is first
    assert kept(("a", 3)) is not first
    assert kept(("a", 2)) is not first  # of the last key alone
    second = kept(("a", 2))
    layer.to(torch.float64)
    assert kept(("a", 2)) is not second


def test_the_old_is_gone_before_the_new_is_made() -> None:
    recorder, layer = GraphRecorder(), nn.Linear(3, 3)
    alive: list[int] = []

    class Large:
        def __init__(self) -> None:
            assert not alive
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    for key in "aab":
        recorder.reuse(key, layer.parameters(), Large)
    assert len(alive) == 1


def test_copies_share_nothing() -> None:
    recorder, layer = GraphRecorder(), nn.Linear(3, 3)
    first: list[int] = recorder.reuse("a", layer.parameters(), list)
    for other in (copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))):
        assert other.reuse("a", layer.parameters(), list) is not first
    assert recorder.reuse("a", layer.parameters(), list) is first


def test_without_cuda_every_step_is_run() -> None:
    recorder = GraphRecorder()
    called: list[int] = []
    recorder.reuse("a", nn.Linear(3, 3).parameters(), list)
    for number in range(5):
        recorder.run("one", partial(called.append, number))
    assert called == [0, 1, 2, 3, 4]
