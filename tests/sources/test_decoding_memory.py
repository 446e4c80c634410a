"""Images that are decoded ahead, or wait for others of their size, are bounded by their pixels, not their number."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from movq_cli.data.images import BadImageError, declared_pixels
from movq_cli.data.prefetch import map_ahead
from movq_cli.sources import stream
from movq_cli.sources.open import open_source


def encoded(suffix: str, size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(buffer, suffix)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_pixels_of_a_file_are_known_before_it_is_decoded(suffix: str) -> None:
    data = encoded(suffix)
    assert declared_pixels(data) == 600
    assert declared_pixels(data[:5]) == 0
    assert declared_pixels(b"") == declared_pixels(b"text" * 100) == 0


@pytest.mark.parametrize("cost", [1, 3, 10, 11])
def test_the_items_worked_on_or_waiting_cost_at_most_the_budget(cost: int) -> None:
    lock, present, most = threading.Lock(), 0, 0

    def work(item: int) -> int:
        nonlocal present, most
        with lock:
            present += cost
            most = max(most, present)
        time.sleep(0.001)
        return item

    results = []
    for item in map_ahead(work, range(60), threads=8, ahead=32, cost=lambda _: cost, budget=10):
        with lock:
            present -= cost
        results.append(item)
    assert results == list(range(60))
    assert most <= max(10, cost) + cost  # The result that is yielded is no longer counted.


def test_images_of_the_largest_size_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PIXELS_AHEAD", 100 * 100)
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(encoded("PNG", (100, 90 + number % 2)))
    lock, open_images, most = threading.Lock(), 0, 0
    decode = stream._decode_pixels

    def counted(data: bytes) -> torch.Tensor:
        nonlocal open_images, most
        with lock:
            open_images += 1
            most = max(most, open_images)
        return decode(data)

    found = 0
    for _, image in stream.mapped(open_source(str(tmp_path)), range(12), counted):
        assert not isinstance(image, BadImageError)
        found += 1
        with lock:
            open_images -= 1
    assert (found, most) == (12, 1)


def test_images_that_wait_for_others_of_their_size_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_WAITING_BYTES", 10_000)
    waiting = 0

    def images() -> Iterator[tuple[int, torch.Tensor]]:
        nonlocal waiting
        for index in range(100):
            image = torch.zeros(3, 20 + index % 3, 20, dtype=torch.uint8)
            waiting += image.nbytes
            yield index, image

    seen = []
    for indices, batch in stream.same_size_batches(images(), 64):
        assert waiting <= 10_000 + 3 * 22 * 20
        waiting -= batch.nbytes
        seen += indices.tolist()
    assert sorted(seen) == list(range(100))
    assert waiting == 0
