"""The grids that commands write have headings, and the images that the headings say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movq_cli.app import app
from movq_cli.data import grids


def run(*arguments: str | Path | int) -> None:
    app([*map(str, arguments), "--quiet", "--device", "cpu"], standalone_mode=False)


def test_a_grid_of_samples_has_a_column_for_each_class_and_otherwise_names_the_class(
    trained_once: Path, tmp_path: Path
) -> None:
    options = ("--run", trained_once / "runs" / "tiny-prior", "-n", 7)
    run("sample", tmp_path / "a", *options, "--grid", tmp_path / "a.png")
    grid, tiles = grids.read(tmp_path / "a.png")
    assert (grid.rows, grid.columns, list(grid.column_labels)) == (3, 3, ["bar", "dot", "sky"])
    for index in range(7):
        with Image.open(tmp_path / "a" / f"{index:06d}.png") as image:
            assert np.array_equal(np.asarray(image), tiles[index])
    run("sample", tmp_path / "b", *options, "--class", "dot", "--grid", tmp_path / "b.png")
    grid, _ = grids.read(tmp_path / "b.png")
    assert (grid.rows, grid.columns, grid.column_labels, grid.top > 0) == (1, 7, [], True)
    many = [part for name in ["bar", "dot"] * 6 for part in ("--class", name)]
    run("sample", tmp_path / "c", *options, *many, "--grid", tmp_path / "c.png")
    grid, _ = grids.read(tmp_path / "c.png")
    assert grid.caption > 0


@pytest.mark.usefixtures("offline")
def test_a_grid_of_reconstructions_has_rows_of_originals_reconstructions_and_errors(
    trained_once: Path, tmp_path: Path
) -> None:
    tokenizer = trained_once / "runs" / "tiny-vq"
    run("reconstruct", trained_once / "pictures", tmp_path / "back", "--run", tokenizer, "--grid", tmp_path / "g.png")
    grid, tiles = grids.read(tmp_path / "g.png")
    assert (grid.rows, list(grid.row_labels)) == (3, list(grids.ROWS))
    originals, reconstructed, errors = np.split(tiles, 3)
    with Image.open(trained_once / "pictures" / "bar" / "000.png") as image:
        assert np.array_equal(np.asarray(image), originals[0])
    with Image.open(tmp_path / "back" / "bar" / "000.png") as image:
        assert np.array_equal(np.asarray(image), reconstructed[0])
    assert np.array_equal(errors, grids.error_map(reconstructed, originals))
