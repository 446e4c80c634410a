"""Distances between the images of two sets are computed in tiles: with the same results, and in constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import measure
from movq_cli.evaluation import distributions
from movq_cli.evaluation.distributions import find_copies, precision_recall

CPU = torch.device("cpu")
WIDTH = 512


def features(count: int, width: int = WIDTH, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def index_of_nearest(point: list[float], others: list[list[float]]) -> int:
    return min(range(len(others)), key=lambda index: math.dist(point, others[index]))


@pytest.mark.parametrize("tile", [4096, 7, 1])
def test_copies_are_the_fakes_whose_nearest_real_image_is_nearer_than_that_images_neighbour(
    monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    monkeypatch.setattr(distributions, "_TILE", tile)
    real, fake = features(31, 4, shift=50.0), features(23, 4, shift=50.5, seed=1)
    found = find_copies(real, fake)
    reals, fakes = real.tolist(), fake.tolist()
    expected = [index_of_nearest(one, reals) for one in fakes]
    assert found.nearest.tolist() == expected
    distances = [math.dist(one, reals[index]) for one, index in zip(fakes, expected, strict=True)]
    assert found.distance.tolist() == pytest.approx(distances, rel=1e-4)
    neighbours = [min(math.dist(reals[i], other) for j, other in enumerate(reals) if j != i) for i in expected]
    copies = sum(distance < neighbour for distance, neighbour in zip(distances, neighbours, strict=True))
    assert 0 < copies < len(fakes)
    assert found.share == pytest.approx(copies / len(fakes))


def test_an_equal_image_is_its_own_copy_in_whichever_tile_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "_TILE", 8)
    real = features(30)
    found = find_copies(real, real.flip(0))
    assert found.nearest.tolist() == list(reversed(range(30)))
    assert found.share == 1


@pytest.mark.parametrize("metric", [find_copies, lambda real, fake: precision_recall(real, fake, k=3)])
def test_memory_is_the_same_for_three_times_as_many_images(
    monkeypatch: pytest.MonkeyPatch, metric: Callable[[Tensor, Tensor], object]
) -> None:
    monkeypatch.setattr(distributions, "_TILE", 64)

    def peak(count: int) -> int:
        real, fake = features(count), features(count, seed=1)
        return measure.peak_memory(lambda: metric(real, fake), CPU)

    added = peak(900) - peak(300)
    assert added / 600 < 64  # bytes an image; a copy of its features has 2,048
