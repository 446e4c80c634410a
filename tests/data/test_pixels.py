"""Images as tensors: the grid of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from movq_cli.data import pixels


@pytest.mark.parametrize(("number", "columns"), [(2, 1), (5, 3), (9, 3), (10, 4), (3, 20)])
def test_a_grid_is_that_of_torchvision(tmp_path: Path, number: int, columns: int) -> None:
    images = torch.randint(0, 256, (number, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels.save_grid(tmp_path / "grid.png", images, columns)
    expected = make_grid(images, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), expected.numpy())


def test_a_single_image_has_lines_around_it(tmp_path: Path) -> None:
    pixels.save_grid(tmp_path / "grid.png", torch.zeros(1, 3, 4, 6, dtype=torch.uint8), 8, scale=2)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (16, 20, 3)
    assert (picture[4:-4, 4:-4] == 0).all() and (picture == 0).sum() == 8 * 12 * 3
