"""Parts of the training loop: the seeds of its steps, and its length."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from movq_cli.settings import TrainVQSettings
from movq_cli.training import loop


def test_every_step_of_every_seed_draws_other_numbers() -> None:
    draws = set()
    for seed in range(20):
        for step in [*range(20), 2**31]:
            torch.manual_seed(loop.step_seed(seed, step))
            draws.add(torch.rand(2, dtype=torch.float64).sum().item())
    assert len(draws) == 20 * 21


@given(st.integers(1, 10_000), st.integers(1, 64), st.floats(0.01, 50))
def test_epochs_become_whole_steps(images: int, batch: int, epochs: float) -> None:
    settings = TrainVQSettings(epochs=epochs, batch_size=batch)
    steps = settings.total_steps(images)
    assert steps >= 1
    assert steps == 1 or abs(steps - epochs * (images // batch)) <= 0.5
