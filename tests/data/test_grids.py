"""A picture in a grid says where its images are, so that they come back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from movq_cli.data import grids
from movq_cli.data.images import encode_png


@settings(max_examples=12)
@given(
    height=st.integers(1, 140),
    width=st.integers(1, 140),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    labelled=st.booleans(),
)
def test_the_images_of_a_grid_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, rows: int, columns: int, labelled: bool
) -> None:
    path = tmp_path_factory.mktemp("grid") / "grid.png"
    images = torch.randint(0, 256, (rows * columns, 3, height, width), dtype=torch.uint8)
    names = ["ä name that is longer than its column is wide"] * columns if labelled else []
    grids.save(path, images, columns, rows=[f"row {row}" for row in range(rows)] if labelled else (), headings=names)
    grid, tiles = grids.read(path)
    assert (grid.rows, grid.columns, list(grid.column_labels)) == (rows, columns, names)
    assert np.array_equal(tiles, images.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(
    "text",
    [
        None,
        "no JSON",
        "{}",
        '{"grid": 3}',
        '{"grid": {"height": 4}}',
        '{"grid": {"height": 0, "width": 4, "rows": 1, "columns": 1}}',
        '{"grid": {"height": 4000000000, "width": 4, "rows": 1, "columns": 1}}',
        '{"grid": {"height": 4, "width": 4, "rows": 1, "columns": 1, "left": -9}}',
        '{"grid": {"height": 4, "width": "4", "rows": 1, "columns": 1}}',
    ],
)
def test_a_picture_that_describes_no_grid_of_its_own_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encode_png(Image.new("RGB", (8, 8)), text=text))
    with pytest.raises(ValueError, match=r"grid|images are|Expecting"):
        grids.read(path)


def test_a_picture_of_an_earlier_version_is_read_by_the_usual_grid(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    grids.save(path, images, 2)
    with Image.open(path) as picture:
        picture.save(path)
        scale = json.loads(picture.info["movq"])["grid"]["scale"]
    assert "movq" not in Image.open(path).info
    _, tiles = grids.read(path, grids.Grid(5, 6, 2, 2, scale))
    assert np.array_equal(tiles, images.permute(0, 2, 3, 1).numpy())


def test_an_error_map_is_black_without_error_and_brighter_with_more() -> None:
    original = np.full((9, 1, 3), 100, np.uint8)
    image = original + (np.arange(9, dtype=np.uint8) * 12)[:, None, None]
    shown = grids.error_map(image, original).astype(int).sum(-1)[:, 0]
    assert shown[0] == 4 and (np.diff(shown[:6]) > 0).all()
    assert (grids.error_map(image, original) == grids.error_map(2 * original - image, original)).all()
