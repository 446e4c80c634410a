"""The cost of a prior, counted on a few of its layers, and the time of its plan."""

from __future__ import annotations

import pytest
import torch
from pytest import MonkeyPatch

from movq_cli.settings import CodeShape, PriorSettings
from movq_cli.training import cost
from movq_cli.training_settings import TrainPriorSettings

CPU = torch.device("cpu")
SHAPE = CodeShape(height=4, width=4, chunks=2, codebook_size=16)


@pytest.mark.parametrize("mode", ["mask", "auto", "depth"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prior_costs_the_same_as_if_each_of_its_layers_were_counted(
    mode: str, checkpointing: bool, monkeypatch: MonkeyPatch
) -> None:
    prior = PriorSettings(mode=mode, layers=7, heads=8, width=512, hidden=2048, classes=3)
    train = TrainPriorSettings(activation_checkpointing=checkpointing, batch_size=512)
    found = cost.of_prior(prior, SHAPE, train, CPU, 1)
    monkeypatch.setattr(cost, "_FEW_LAYERS", prior.layers)
    assert found == cost.of_prior(prior, SHAPE, train, CPU, 1)
    assert found.memory["activations"] > 0.05
