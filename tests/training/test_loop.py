"""The loop's small parts: rates, averages, seeds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from movq_cli.settings import TrainSettings, TrainVQSettings
from movq_cli.training import loop


def rates(settings: TrainSettings, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=settings.learning_rate)
    schedule = loop.learning_rate_schedule(optimizer, settings, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_rate_is_base_rate_times_global_batch() -> None:
    assert rates(TrainVQSettings(), 3) == pytest.approx([4.5e-6 * 48] * 3)


def test_it_rises_over_the_warm_up_and_falls_to_zero_by_a_cosine() -> None:
    settings = TrainVQSettings(warmup_steps=4, decay="cosine", base_learning_rate=1.0, batch_size=1)
    seen = rates(settings, 12)
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert seen[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])


def test_the_exported_average_is_the_closed_form() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trained = loop.Trainable(model, optimizer, TrainVQSettings(ema_decay=0.9), 20)
    expected = 0.0
    for step in range(20):
        trained.update(lambda: model.weight.sum().neg().backward())  # one up each step
        expected = 1.0 if step == 0 else 0.9 * expected + 0.1 * (step + 1)
    assert model.weight.item() == 20
    assert trained.exported.weight.item() == pytest.approx(expected, rel=1e-5)
    plain = loop.Trainable(model, optimizer, TrainVQSettings(), 20)
    assert plain.exported is model


def test_the_norm_of_the_gradients_is_clipped_where_asked() -> None:
    for clip_norm, moved in ((None, 50.0), (2.0, 2.0)):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trained = loop.Trainable(model, optimizer, TrainVQSettings(clip_norm=clip_norm), 1)
        trained.update(lambda model=model: (50 * model.weight).sum().backward())
        assert model.weight.item() == pytest.approx(-moved)


def test_steps_and_runs_draw_numbers_of_their_own() -> None:
    first = set()
    for seed in range(20):
        for step in [*range(20), 2**31]:
            torch.manual_seed(loop.step_seed(seed, step))
            first.add(torch.rand(2, dtype=torch.float64).sum().item())
    assert len(first) == 20 * 21


@given(st.integers(1, 10_000), st.integers(1, 64), st.floats(0.01, 50))
def test_epochs_become_whole_steps(images: int, batch: int, epochs: float) -> None:
    settings = TrainVQSettings(epochs=epochs, batch_size=batch)
    steps = settings.total_steps(images)
    assert steps >= 1
    assert steps == 1 or abs(steps - epochs * (images // batch)) <= 0.5
