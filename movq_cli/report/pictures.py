"""The pictures of a run on the page: films of the validations, and pictures as data URIs of a limited size."""

from __future__ import annotations

import base64
import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from movq_cli.data import grids
from movq_cli.data.grids import Grid
from movq_cli.data.spacing import evenly_spaced
from movq_cli.report.blocks import Film, Row, Text
from movq_cli.run_history import RunHistory

Pixels = NDArray[np.uint8]

FILM_BYTES = 2_400_000
"""Largest size of a film, bytes."""

_MOST_STEPS = 24
"""Largest number of steps in a film."""

_EXACT_PIXELS = 2**15
"""Number of pixels up to which a picture is stored without loss."""

_DISPLAYED_WIDTH = 900
"""Width that a strip has at first, about, pixels."""


@lru_cache(maxsize=1024)
def _encoded(data: bytes, height: int, width: int) -> str:
    image = Image.frombytes("RGB", (width, height), data)
    buffer = io.BytesIO()
    if height * width <= _EXACT_PIXELS:
        image.save(buffer, "WEBP", lossless=True, method=2)
        kind = "webp"
    else:
        image.save(buffer, "JPEG", quality=85, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def data_uri(pixels: Pixels) -> str:
    """Return a picture [H, W, 3] as a data URI; a large one loses a little by its compression."""
    return _encoded(np.ascontiguousarray(pixels).tobytes(), *pixels.shape[:2])


def strip(images: Pixels) -> Pixels:
    """Return images [B, H, W, 3] side by side, [H, B W, 3]."""
    return np.concatenate(list(images), axis=1)


def read_tiles(history: RunHistory, step: int) -> tuple[Grid, Pixels] | None:
    """Return the images [B, H, W, 3] of the picture of a step; None if they cannot be read."""
    try:
        return grids.read(history.run.picture(step), _old_grid(history))
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def originals_and_reconstructions(history: RunHistory, step: int) -> tuple[Pixels, Pixels] | None:
    """Return the originals and the reconstructions [B, H, W, 3] in a tokenizer's picture; None without them."""
    found = read_tiles(history, step)
    if found is None or found[0].rows < 2:
        return None
    columns = found[0].columns
    return found[1][:columns], found[1][columns : 2 * columns]


def film(history: RunHistory) -> Film | Text:
    """Return the pictures of a run's validations by step."""
    title = "Fixed validation images over time" if history.manifest.kind == "vq" else "Samples over time"
    if not history.pictures:
        return Text(title, "The run has no pictures yet: it writes one at each validation.")
    frames = {step: found for step in _chosen(history) if (found := _strips(history, step)) is not None}
    shapes = [(found[0].height, found[0].width, found[0].columns, len(found[1])) for found in frames.values()]
    frames = {step: found for (step, found), shape in zip(frames.items(), shapes, strict=True) if shape == shapes[-1]}
    if not frames:
        return Text(title, "The pictures of this run cannot be read.")
    grid, last = list(frames.values())[-1]
    rows = []
    for index, (label, _) in enumerate(last):
        strips = [data_uri(found[index][1]) for _, found in frames.values()]
        rows.append(Row(label, strips[-1:] if len(set(strips)) == 1 else strips))
    width = grid.width * grid.columns
    zoom = max(1, min(6, _DISPLAYED_WIDTH // width))
    columns = list(grid.column_labels) or [""] * grid.columns
    if history.manifest.kind == "vq":
        note = (
            "Originals, what the tokenizer makes of them, and the mean absolute error of each pixel: black is 0, "
            f"purple about 20, orange about 45, and light yellow {grids.LARGEST_ERROR} levels of 256 or more. Healthy: "
            "the error maps darken everywhere but at fine texture. Regular dots or stripes in flat areas are "
            "checkerboards; an error that fills flat areas is a cast of color."
        )
    else:
        note = (
            "The same seeds and classes at every step, by the exported weights. Healthy: shapes appear and then "
            "sharpen, and the samples of a class differ from each other."
        )
    return Film(title, note, "step", list(frames), rows, columns, width, zoom)


def _strips(history: RunHistory, step: int) -> tuple[Grid, list[tuple[str, Pixels]]] | None:
    """Return the rows of a film at a step: their labels and pictures."""
    found = read_tiles(history, step)
    if found is None:
        return None
    grid, tiles = found
    rows = [tiles[row * grid.columns : (row + 1) * grid.columns] for row in range(grid.rows)]
    if history.manifest.kind == "vq" and len(rows) >= 2:
        errors = grids.error_map(rows[1], rows[0])
        return grid, [(label, strip(row)) for label, row in zip(grids.ROWS, (*rows[:2], errors), strict=True)]
    return grid, [(f"sample {row + 1}", strip(images)) for row, images in enumerate(rows)]


def _chosen(history: RunHistory) -> list[int]:
    """Return the steps of a film, evenly spaced, as many as its size allows by the size of the last picture."""
    last = _strips(history, history.pictures[-1])
    changing = [] if last is None else last[1][1:] if history.manifest.kind == "vq" else last[1]
    size = sum(len(data_uri(picture)) for _, picture in changing)
    count = min(len(history.pictures), _MOST_STEPS, max(2, FILM_BYTES // max(size, 1)))
    return [history.pictures[index] for index in evenly_spaced(len(history.pictures), count)]


def _old_grid(history: RunHistory) -> Grid | None:
    """Return how the images lie in a picture that does not say it, as those of earlier versions."""
    size = history.manifest.settings.vq.image_size
    scale = max(1, 64 // size.width)
    rows, columns = (2, 8) if history.manifest.kind == "vq" else (4, 4)
    return Grid(size.height, size.width, rows, columns, scale)


def enlarged(pixels: Pixels, factor: int) -> Pixels:
    """Return a picture [H, W, 3] with each pixel repeated."""
    return pixels.repeat(factor, 0).repeat(factor, 1)
