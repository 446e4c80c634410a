"""The suggested settings are the largest that fit into the memory, and each of them does fit."""

from __future__ import annotations

import pytest
import torch

from movq_cli import devices
from movq_cli.devices import Memory
from movq_cli.training import fit
from movq_cli.training.cost import Cost
from movq_cli.training_settings import TrainSettings, TrainVQSettings

RANKS = 2


def cost_of(train: TrainSettings) -> Cost:
    """A model of 1 GiB with 0.5 GiB of activations for each image, and a fifth of them with checkpointing."""
    images = train.batch_size // RANKS // train.accumulate
    activations = images * (0.1 if train.activation_checkpointing else 0.5)
    return Cost({"activations": activations, "transient": 0.3 * activations, "total": 1 + 1.3 * activations}, 0)


def changed(train: TrainSettings, remedy: str) -> TrainSettings:
    """The settings after a remedy such as `-o train_vq.accumulate=4`."""
    pairs = [part.removeprefix("train_vq.").split("=") for part in remedy.split() if part != "-o"]
    values = {name: True if value == "true" else int(value) for name, value in pairs}
    return TrainVQSettings.model_validate(train.model_dump() | values)


@pytest.mark.parametrize("limit", [2.5, 3.5, 5.0, 8.2, 12.5, 30.5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_remedy_fits_and_a_smaller_change_does_not(limit: float, accumulate: int) -> None:
    train = TrainVQSettings(batch_size=96, accumulate=accumulate)
    found = fit.remedies("train_vq", train, cost_of, limit, RANKS)
    assert found
    for remedy in found:
        after = changed(train, remedy)
        assert fit.needed_memory(cost_of(after)) <= limit
        assert after.batch_size % (RANKS * after.accumulate) == 0
        if remedy.startswith("-o train_vq.batch_size"):
            more = after.batch_size + RANKS * accumulate
            assert more > train.batch_size or fit.needed_memory(cost_of(changed(train, f"batch_size={more}"))) > limit
        if remedy.startswith("-o train_vq.accumulate"):
            fewer = [parts for parts in range(accumulate, after.accumulate) if 48 % parts == 0]
            for parts in fewer:
                assert fit.needed_memory(cost_of(changed(train, f"accumulate={parts}"))) > limit


def test_where_the_weights_alone_are_too_large_there_is_no_remedy() -> None:
    train = TrainVQSettings(batch_size=96)
    assert fit.remedies("train_vq", train, cost_of, 1.7, RANKS) == []
    assert "--device" in fit.advice([])


def test_checkpointing_and_parts_are_combined_if_neither_suffices() -> None:
    train = TrainVQSettings(batch_size=96)
    (remedy,) = fit.remedies("train_vq", train, cost_of, 2.1, RANKS)
    assert remedy == "-o train_vq.activation_checkpointing=true -o train_vq.accumulate=24"
    assert fit.needed_memory(cost_of(changed(train, remedy))) <= 2.1


def test_a_training_is_tight_or_impossible_by_the_memory_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # The process that runs many tests has more memory than one that begins a training.
    monkeypatch.setattr(devices, "process_memory", lambda: 0.7)
    cpu = torch.device("cpu")
    cost = cost_of(TrainVQSettings(batch_size=16))  # 5 GiB and what else it needs
    before = devices.process_memory()
    needed = fit.needed_memory(cost)
    plenty = fit.fit(cost, cpu, 1, Memory(100.0, 90.0))
    assert not plenty.is_tight
    assert not plenty.is_impossible
    assert plenty.peak == pytest.approx(before + needed, abs=0.05)
    assert fit.fit(cost, cpu, 1, Memory(100.0, needed - 0.1)).is_tight
    assert fit.fit(cost, cpu, 1, Memory(needed, needed)).is_tight
    assert not fit.fit(cost, cpu, 1, Memory(needed, needed)).is_impossible
    assert fit.fit(cost, cpu, 1, Memory(needed / 2, needed / 2)).is_impossible
    assert fit.fit(cost, cpu, 3, Memory(100.0, 90.0)).needed == pytest.approx(3 * needed)
