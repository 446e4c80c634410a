"""The order of training is a function of seed and step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from movq_cli.data.sampler import EpochOrder
from movq_cli.errors import BadRequestError


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 3), st.integers(0, 2**31))
def test_every_image_at_most_once_an_epoch_and_all_but_a_last_partial_batch(
    images: int, batch: int, epoch: int, seed: int
) -> None:
    if images < batch:
        with pytest.raises(BadRequestError, match=f"{images} images"):
            EpochOrder(images, batch, seed)
        return
    order = EpochOrder(images, batch, seed)
    first = epoch * order.steps_per_epoch
    steps = [order.batch(step) for step in range(first, first + order.steps_per_epoch)]
    assert {number for number, _ in steps} == {epoch}
    seen = np.concatenate([indices for _, indices in steps])
    assert len(seen) == len(set(seen.tolist())) == images - images % batch
    assert set(seen.tolist()) <= set(range(images))


def test_a_step_requested_out_of_order_is_the_same_step() -> None:
    forwards, backwards = EpochOrder(50, 7, 3), EpochOrder(50, 7, 3)
    steps = [forwards.batch(step)[1].tolist() for step in range(30)]
    assert [backwards.batch(step)[1].tolist() for step in reversed(range(30))] == steps[::-1]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [EpochOrder(100, 100, seed).batch(epoch)[1].tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
