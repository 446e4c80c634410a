"""Masked reconstruction keeps the visible codes and draws the hidden ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from movq_cli.api import Prior
from movq_cli.commands import fill
from movq_cli.data import grids, pixels
from movq_cli.models.masked_prior import ratio_mask
from movq_cli.settings import CodeShape

if TYPE_CHECKING:
    from tests.conftest import Movq

PAPER = CodeShape(height=16, width=16, chunks=4, codebook_size=1024)


@pytest.mark.parametrize(("ratio", "visible"), [(1.0, 0), (0.95, 12), (0.8, 51), (0.2, 204), (0.0, 256)])
def test_a_ratio_leaves_the_same_number_visible_in_every_channel(ratio: float, visible: int) -> None:
    mask = ratio_mask(ratio, [0, 7], PAPER)
    assert mask.shape == (2, 16, 16, 4)
    assert ((~mask).sum((1, 2)) == visible).all()


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_a_larger_ratio_hides_what_a_smaller_one_does(one: float, two: float, seed: int) -> None:
    small, large = (ratio_mask(ratio, [seed], PAPER) for ratio in sorted((one, two)))
    assert (large | ~small).all()


def test_each_channel_hides_other_positions() -> None:
    mask = ratio_mask(0.5, [3], PAPER)[0]
    assert all(not torch.equal(mask[..., 0], mask[..., channel]) for channel in (1, 2, 3))


def test_an_image_with_nothing_hidden_is_its_reconstruction(movq: Movq, trained: Path) -> None:
    movq("reconstruct", "data", "plain", "--split", "val")
    movq("reconstruct", "pictures/dot", "filled", "--mask-ratio", "0")
    prior = Prior.load(trained / "runs" / "tiny-prior")
    for path in sorted((trained / "filled").iterdir())[:3]:
        original = fill._read_cropped((trained / "pictures" / "dot" / path.name).read_bytes(), prior)
        expected = pixels.to_bytes(prior.tokenizer.decode(prior.tokenizer.encode(pixels.to_signed(original[None]))))
        found = np.asarray(Image.open(path)).astype(int)
        assert np.abs(found - expected[0].permute(1, 2, 0).numpy()).max() <= 1


def test_visible_codes_remain_and_hidden_ones_are_drawn(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = Prior.load(trained / "runs" / "tiny-prior")
    original = fill._read_cropped((trained / "pictures" / "bar" / "003.png").read_bytes(), prior)
    codes = prior.tokenizer.encode(pixels.to_signed(original[None]))
    hidden = ratio_mask(0.6, [1], prior.transformer.shape)
    decoded: list[torch.Tensor] = []
    decode = prior.tokenizer.decode

    def record_and_decode(drawn: torch.Tensor) -> torch.Tensor:
        decoded.append(drawn)
        return decode(drawn)

    monkeypatch.setattr(prior.tokenizer, "decode", record_and_decode)
    images = fill._fill_codes(prior, original, hidden, [0, 1, 2], prior.header.sample)
    assert images.shape == (3, *original.shape)
    (drawn,) = decoded
    visible = ~hidden.expand(3, -1, -1, -1)
    assert torch.equal(drawn[visible], codes.expand(3, -1, -1, -1)[visible])
    assert not torch.equal(drawn[0], drawn[1])
    assert drawn.max() < prior.transformer.unknown


def test_a_painted_mask_changes_only_what_it_paints(movq: Movq, trained: Path) -> None:
    paint = np.zeros((16, 20, 3), dtype=np.uint8)
    paint[3:7, 4:9] = 255
    Image.fromarray(paint).save(trained / "mask.png")
    done = movq("reconstruct", "pictures/sky", "painted", "--mask", "mask.png", "--samples", "2", "--json")
    assert '"fillings": 2' in done.stdout
    original = np.asarray(Image.open(trained / "pictures" / "sky" / "000.png"))[:, 2:18]
    one, two = (np.asarray(Image.open(trained / "painted" / f"000-{number}.png")) for number in (0, 1))
    painted = paint[:, 2:18, 0] == 255
    for image in (one, two):
        assert np.array_equal(image[~painted], original[~painted])
        assert not np.array_equal(image[painted], original[painted])


def test_the_same_seed_gives_the_same_filling_and_top1_another(movq: Movq, trained: Path) -> None:
    for folder, more in (("a", []), ("b", []), ("c", ["--seed", "5"]), ("d", ["--top1"])):
        movq("reconstruct", "pictures/bar", folder, "--mask-ratio", "0.95", *more)
    a, b, c, d = ((trained / folder / "004.png").read_bytes() for folder in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_the_figure_has_a_row_for_each_filling_and_a_column_for_each_ratio(movq: Movq, trained: Path) -> None:
    movq("reconstruct", "pictures/bar", "out", "--mask-ratio", "0.5", "--samples", "2", "--figure", "figure.png")
    grid, tiles = grids.read(trained / "figure.png")
    assert (grid.height, grid.width, grid.rows, grid.columns) == (16, 16, 4 * 3, 1 + len(fill.FIGURE_RATIOS))
    assert list(grid.row_labels) == ["likeliest", "drawn", "drawn"] * 4
    assert list(grid.column_labels[:3]) == ["original", "100% hidden", "95% hidden"]
    assert len(tiles) == 12 * 8


def test_bad_masks_and_combinations_of_options_are_refused(movq: Movq, trained: Path) -> None:
    (trained / "no.png").write_bytes(b"none")
    for arguments, words in (
        (["--mask-ratio", "0.5", "--mask", "no.png"], "both say what is hidden"),
        (["--mask", "no.png"], "is not a picture"),
        (["--mask", "missing.png"], "cannot be read"),
        (["--mask-ratio", "0.5", "--codes", "codes"], "--codes has no effect with"),
        (["--figure", "figure.png"], "need --mask-ratio"),
        (["--top1"], "need --mask-ratio"),
    ):
        assert words in movq("reconstruct", "pictures", "out", *arguments, code=2).stderr
    assert not (trained / "out").exists()
