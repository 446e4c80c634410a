"""A model in training: rates, averages, clipping, and what a step that is not finite leaves alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from movq_cli.ranks import SINGLE_PROCESS
from movq_cli.training import trainable
from movq_cli.training_settings import TrainSettings, TrainVQSettings

FINITE = torch.ones(())


def rates(settings: TrainSettings, steps: int) -> list[float]:
    """The rates that updates really use: the way of a weight under plain gradient descent along a gradient of 1."""
    weight = nn.Linear(1, 1, bias=False)
    trained = wrapped(weight, settings, steps)
    seen = []
    for step in range(steps):
        before = weight.weight.item()
        backward(trained, weight.weight.sum())
        trained.update(step, FINITE)
        seen.append(before - weight.weight.item())
    return seen


def wrapped(model: nn.Linear, settings: TrainSettings, steps: int) -> trainable.Trainable[nn.Linear]:
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    return trainable.Trainable(model, optimizer, settings, steps, SINGLE_PROCESS)


def backward(trained: trainable.Trainable[Any], loss: Tensor) -> Tensor:
    trained.clear()
    loss.backward()
    return trained.clip()


def test_the_rate_is_base_rate_times_global_batch() -> None:
    assert rates(TrainVQSettings(), 3) == pytest.approx([4.5e-6 * 48] * 3, rel=1e-3)


def test_it_rises_over_the_warm_up_and_falls_to_zero_by_a_cosine() -> None:
    settings = TrainVQSettings(warmup_steps=4, decay="cosine", base_learning_rate=1.0, batch_size=1)
    seen = rates(settings, 12)
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert seen[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)], abs=1e-6)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_exported_average_is_the_closed_form(decay: float) -> None:
    model = nn.Linear(1, 1, bias=False)
    settings = TrainVQSettings(ema_decay=decay, base_learning_rate=1.0, batch_size=1)
    trained = wrapped(model, settings, 120)
    expected = 0.0
    for step in range(120):
        backward(trained, model.weight.sum().neg())  # one up each step
        trained.update(step, FINITE)
        rate = min(decay, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * (step + 1)
    assert model.weight.item() == 120
    assert trained.exported.weight.item() == pytest.approx(expected, rel=1e-5)
    plain = wrapped(model, TrainVQSettings(), 20)
    assert plain.exported is model


def test_the_average_of_a_short_run_forgets_the_initial_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    trained = wrapped(model, TrainVQSettings(ema_decay=0.9999, base_learning_rate=1e-9, batch_size=1), 100)
    with torch.no_grad():
        model.weight.fill_(1.0)  # The average still has the initial 0.
    for step in range(100):
        backward(trained, model.weight.sum())
        trained.update(step, FINITE)
    assert trained.exported.weight.item() == pytest.approx(1.0, abs=1e-6)


def test_the_norm_of_the_gradients_is_clipped_on_request_and_reported() -> None:
    for clip_norm, moved in ((None, 50.0), (2.0, 2.0)):
        model = nn.Linear(1, 1, bias=False)
        settings = TrainVQSettings(clip_norm=clip_norm, base_learning_rate=1.0, batch_size=1)
        trained = wrapped(model, settings, 1)
        assert backward(trained, (50 * model.weight).sum()).item() == pytest.approx(50)
        trained.update(0, FINITE)
        assert model.weight.item() == pytest.approx(-moved)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_from_the_first_step_that_is_not_finite_nothing_moves(kind: type[torch.optim.Adam]) -> None:
    model = nn.Linear(3, 2)
    settings = TrainVQSettings(ema_decay=0.5, base_learning_rate=0.1, batch_size=1)
    trained = trainable.Trainable(model, kind(model.parameters(), fused=True), settings, 10, SINGLE_PROCESS)
    finite_check = trainable.FiniteCheck(torch.device("cpu"), SINGLE_PROCESS)
    before: dict[str, Any] = {}
    for step in range(6):
        if step == 3:
            before = copy.deepcopy(trained.state_dict())
        scale = math.nan if step == 3 else 1.0
        norm = backward(trained, (scale * model(torch.ones(1, 3))).sum())
        trained.update(step, finite_check.update(step, {"loss": torch.tensor(float(step)), "norm": norm}))
    failure = finite_check.first_failure()
    assert failure is not None
    step, values = failure
    assert (step, values["loss"], math.isnan(values["norm"])) == (3, 3.0, True)
    after = trained.state_dict()
    for part in ("model", "average"):
        for name, value in before[part].items():
            assert torch.equal(value, after[part][name]) or name == "n_averaged"
    for name, state in before["optimizer"]["state"].items():
        assert all(torch.equal(value, after["optimizer"]["state"][name][key]) for key, value in state.items())


def test_the_check_reports_the_first_failure_whatever_follows() -> None:
    finite_check = trainable.FiniteCheck(torch.device("cpu"), SINGLE_PROCESS)
    assert finite_check.update(4, {"a": torch.tensor(1.0)}) == 1
    assert finite_check.first_failure() is None
    assert finite_check.update(5, {"a": torch.tensor(2.0), "b": torch.tensor(math.inf)}) == 0
    assert finite_check.update(6, {"a": torch.tensor(3.0)}) == 0
    assert finite_check.update(7, {"a": torch.tensor(4.0), "b": torch.tensor(math.nan)}) == 0
    assert finite_check.first_failure() == (5, {"a": 2.0, "b": math.inf})


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_replaced_rows_restart_and_the_others_go_on(kind: type[torch.optim.Adam]) -> None:
    linear, convolution = nn.Linear(3, 4), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(linear, convolution)
    settings = TrainVQSettings(ema_decay=0.5, base_learning_rate=0.1, batch_size=1)
    trained = trainable.Trainable(model, kind(model.parameters(), fused=True), settings, 10, SINGLE_PROCESS)
    for step in range(3):
        backward(trained, sum((weight**2).sum() for weight in model.parameters()))  # type: ignore[arg-type]
        trained.update(step, FINITE)
    before = copy.deepcopy(trained.state_dict())
    rows = torch.tensor([True, False, False, True])
    with torch.no_grad():
        convolution.weight[rows] = 7.0
    trained.reset_rows({"1.weight": rows})
    after = trained.state_dict()
    assert trained.average is not None
    average = trained.average.module.get_submodule("1")
    assert isinstance(average, nn.Conv2d)
    assert (average.weight[rows] == 7).all()
    assert torch.equal(after["average"]["module.1.weight"][~rows], before["average"]["module.1.weight"][~rows])
    for index, (name, _) in enumerate(model.named_parameters()):
        for key, value in after["optimizer"]["state"][index].items():
            old = before["optimizer"]["state"][index][key]
            assert old.any()
            if name == "1.weight" and key != "step":
                assert not value[rows].any()
                assert torch.equal(value[~rows], old[~rows])
            else:
                assert torch.equal(value, old)
