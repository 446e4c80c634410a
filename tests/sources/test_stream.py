"""Images as tensors: in order, corrupt images separate, batches of one size in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from movq_cli.data.images import BadImageError
from movq_cli.sources import stream
from movq_cli.sources.open import open_source


def test_images_come_in_the_requested_order_and_corrupt_ones_with_their_reason(tmp_path: Path) -> None:
    for number in range(60):
        Image.new("RGB", (5, 4), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "07.png").write_bytes(b"")
    order = [int(index) for index in np.random.default_rng(0).permutation(60)]
    found = list(stream.decoded(open_source(str(tmp_path)), order))
    assert [index for index, _ in found] == order
    for index, image in found:
        if index == 7:
            assert isinstance(image, BadImageError)
            assert "empty" in str(image)
        else:
            assert isinstance(image, torch.Tensor)
            assert (image.dtype, image.shape) == (torch.uint8, (3, 4, 5))
            assert (image[0] == index).all()


@given(st.lists(st.integers(1, 4), max_size=60), st.integers(1, 7))
def test_batches_hold_every_image_once_with_others_of_its_size(sides: list[int], batch_size: int) -> None:
    images = [(place, torch.full((3, side, 2), place, dtype=torch.uint8)) for place, side in enumerate(sides)]
    places: list[int] = []
    for batch_places, batch in stream.same_size_batches(images, batch_size):
        assert 1 <= len(batch_places) == len(batch) <= batch_size
        for place, image in zip(batch_places.tolist(), batch, strict=True):
            assert torch.equal(image, images[place][1])
        places += batch_places.tolist()
    assert sorted(places) == list(range(len(sides)))


def test_many_sizes_do_not_wait_in_memory_for_their_like() -> None:
    waiting = 0

    def images() -> Iterator[tuple[int, torch.Tensor]]:
        nonlocal waiting
        for i in range(200):
            waiting += 1
            yield i, torch.zeros(3, i + 1, 1, dtype=torch.uint8)

    for places, _ in stream.same_size_batches(images(), 4):
        assert waiting <= 4 * 4 + 1
        waiting -= len(places)
    assert waiting == 0
