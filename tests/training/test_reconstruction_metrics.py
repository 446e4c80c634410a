"""The errors of color against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from movq_cli.training.reconstruction_metrics import ColorError

CPU = torch.device("cpu")


def test_the_errors_are_those_of_numpy_whatever_the_batches_are() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randint(0, 256, (2, 7, 3, 5, 4), dtype=torch.uint8, generator=generator)
    colors = ColorError(CPU)
    for part in (slice(0, 4), slice(4, 7)):
        colors.update(new[part], old[part])
    a, b = new.numpy().astype(np.float64), old.numpy().astype(np.float64)
    error = np.abs(a.mean((2, 3)) - b.mean((2, 3))).mean()
    saturation = (a.max(1) - a.min(1)).mean() / (b.max(1) - b.min(1)).mean()
    assert colors.metrics() == pytest.approx({"color_error": error, "saturation": saturation})


def test_grey_reconstructions_of_colored_images_have_no_saturation() -> None:
    old = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    old[:, 0] = 90
    colors = ColorError(CPU)
    colors.update(torch.full_like(old, 30), old)
    assert colors.metrics() == {"color_error": pytest.approx((60 + 30 + 30) / 3), "saturation": 0.0}


def test_the_ratio_to_a_grey_set_is_left_out() -> None:
    grey = torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)
    colors = ColorError(CPU)
    colors.update(grey, grey)
    assert colors.metrics() == {"color_error": 0.0}
