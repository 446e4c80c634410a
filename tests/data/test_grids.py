"""A picture in a grid says where its images are, so that they come back as they were."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.utils import make_grid

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


@pytest.mark.parametrize(("number", "columns"), [(2, 1), (5, 3), (9, 3), (10, 4), (3, 20)])
def test_without_headings_a_grid_is_that_of_torchvision_enlarged(tmp_path: Path, number: int, columns: int) -> None:
    images = torch.randint(0, 256, (number, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grids.save(tmp_path / "grid.png", images, columns)
    expected = make_grid(images, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()
    shown = np.asarray(Image.open(tmp_path / "grid.png"))
    np.testing.assert_array_equal(shown, expected.repeat(2, 0).repeat(2, 1))


def test_every_heading_is_beside_what_it_names_and_outside_of_the_images(tmp_path: Path) -> None:
    images = np.full((4, 30, 40, 3), 7, np.uint8)
    named: dict[str, Any] = {
        "title": "8 steps",
        "rows": ("a", "b"),
        "headings": ("c", "d"),
        "captions": ("e", "f", "g", "h"),
    }
    grids.save(tmp_path / "all.png", images, 2, **named)
    grid, tiles = grids.read(tmp_path / "all.png")
    assert np.array_equal(tiles, images)
    picture = np.asarray(Image.open(tmp_path / "all.png")).min(-1)
    dark = {}
    for name in named:
        grids.save(tmp_path / "less.png", images, 2, **{key: texts for key, texts in named.items() if key != name})
        dark[name] = grids.read(tmp_path / "less.png")[0].top, grids.read(tmp_path / "less.png")[0].caption
    line = grid.caption
    assert (grid.top, grid.left > 12) == (2 * line, True)
    assert dark == {
        "title": (line, line),
        "rows": (2 * line, line),
        "headings": (line, line),
        "captions": (2 * line, 0),
    }
    for index in range(4):
        x, y = grid.corner(index)
        above = picture[y - line : y, x : x + 40 * grid.scale]
        assert (above < 128).any(), index
        assert (picture[y - 2 : y, x : x + 40 * grid.scale] == 255).all()
    assert (picture[:line] < 128).any() and (picture[line : 2 * line] < 128).any()


def test_names_from_files_cannot_break_a_picture(tmp_path: Path) -> None:
    evil = ["two\nlines", "\x1b[31mred", "bytes \udcff", "", "\u202eright to left"]
    images = np.zeros((5, 9, 9, 3), np.uint8)
    choices: list[dict[str, Any]] = [{"headings": evil}, {"rows": evil}, {"captions": evil}, {"title": evil[0]}]
    for headings in choices:
        grids.save(tmp_path / "grid.png", images, 1 if "rows" in headings else 5, **headings)
        assert np.array_equal(grids.read(tmp_path / "grid.png")[1], images)


def test_a_grid_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, movq_cli.data.grids; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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
