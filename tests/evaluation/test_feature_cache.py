"""Features of a set: in its order, computed once, by whoever, for that content and no other."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from movq_cli.console import Console
from movq_cli.data.blocks import Blocks
from movq_cli.evaluation import feature_cache
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from tests.conftest import on_ranks, start_ranks

CPU = torch.device("cpu")
COUNT = 40


class Means:
    """Stands in for a network: mean, smallest and largest value of an image."""

    name, width, digest = "means", 3, "0" * 64

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        time.sleep(self.pause)
        self.seen += len(images)
        flat = images.flatten(1).float()
        return torch.stack([flat.mean(1), flat.amin(1), flat.amax(1)], dim=1)


def write(folder: Path, count: int = COUNT) -> Path:
    draws = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        side = 8 + number % 3
        Image.fromarray(draws.integers(0, 256, (side, 9, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return folder


def expected(folder: Path) -> np.ndarray:
    pixels = [np.asarray(Image.open(path)).astype(np.float32) for path in sorted(folder.iterdir())]
    return np.array([[image.mean(), image.min(), image.max()] for image in pixels])


def see(
    folder: Path, cache: Path, network: Means | None = None, *, ranks: Ranks = SINGLE_PROCESS, batch_size: int = 4
) -> feature_cache.Features:
    images = ImageSet("real", str(folder), "val", console=Console(quiet=True))
    return feature_cache.cached_features(
        images,
        network or Means(),
        cache,
        batch_size=batch_size,
        device=CPU,
        ranks=ranks,
        console=Console(quiet=True),
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_BLOCK_IMAGES", 3)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_they_keep_the_order_of_the_set_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    folder = write(tmp_path / "images")
    found = see(folder, tmp_path / "cache", batch_size=batch_size)
    np.testing.assert_allclose(found.rows, expected(folder), rtol=1e-6)
    mean, covariance = found.statistics(CPU)
    np.testing.assert_allclose(mean, expected(folder).mean(0), rtol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(expected(folder).astype(np.float64), rowvar=False), rtol=1e-5)


def test_they_are_computed_once_for_a_content_wherever_it_lies(tmp_path: Path) -> None:
    network = Means()
    folder = write(tmp_path / "images")
    see(folder, tmp_path / "cache", network)
    shutil.copytree(folder, tmp_path / "elsewhere")
    for again in (folder, tmp_path / "elsewhere"):
        np.testing.assert_allclose(see(again, tmp_path / "cache", network).rows, expected(folder), rtol=1e-6)
    assert network.seen == COUNT


def test_a_set_that_has_changed_under_its_old_name_is_seen_anew(tmp_path: Path) -> None:
    folder = write(tmp_path / "images")
    see(folder, tmp_path / "cache")
    path = folder / "017.png"
    status = path.stat()
    Image.fromarray(np.full((8, 9, 3), 7, np.uint8)).save(path)
    with path.open("ab") as file:
        file.write(b"0" * (status.st_size - path.stat().st_size))  # the same size and time
    import os

    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert see(folder, tmp_path / "cache").rows[17].tolist() == [7, 7, 7]


def test_another_network_or_crop_has_features_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "images")
    network = Means()
    see(folder, tmp_path / "cache", network)
    network.digest = "1" * 64
    see(folder, tmp_path / "cache", network)
    assert network.seen == 2 * COUNT
    images = ImageSet("real", str(folder), "val", crop=8, console=Console(quiet=True))
    feature_cache.cached_features(
        images, network, tmp_path / "cache", batch_size=4, device=CPU, console=Console(quiet=True)
    )
    assert network.seen == 3 * COUNT


def test_a_corrupt_image_is_named_each_time_and_has_no_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "images")
    (folder / "004.png").write_bytes(b"no picture")
    for _ in range(2):
        found = see(folder, tmp_path / "cache")
        assert found.indices.tolist() == [number for number in range(COUNT) if number != 4]
        assert len(found.rows) == COUNT - 1
        assert capsys.readouterr().err == "warning: real: left out 004.png: not an image\n"
    (folder / "004.png").unlink()
    np.testing.assert_allclose(found.rows, expected(folder), rtol=1e-6)


def test_the_least_recently_used_set_is_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    sets = [write(tmp_path / str(count), count) for count in (5, 6, 7)]
    see(sets[0], cache)
    size = sum(path.stat().st_size for path in cache.rglob("*.*"))
    monkeypatch.setattr(feature_cache, "CACHE_LIMIT_BYTES", round(2.5 * size))
    see(sets[1], cache)
    time.sleep(0.01)
    see(sets[0], cache)  # it is used again
    time.sleep(0.01)
    see(sets[2], cache)
    network = Means()
    see(sets[0], cache, network)
    assert network.seen == 0
    see(sets[1], cache, network)
    assert network.seen == 6


def compute(ranks: Ranks, given: tuple[Path, Path, float]) -> int:
    """See a set, slowly; how many images this rank has seen."""
    folder, cache, pause = given
    network = Means(pause)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "_BLOCK_IMAGES", 3)
        assert len(see(folder, cache, network, ranks=ranks, batch_size=3).rows) == COUNT
    return network.seen


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_ranks_compute_half_each_and_the_same_bytes(tmp_path: Path) -> None:
    folder = write(tmp_path / "images")
    compute(SINGLE_PROCESS, (folder, tmp_path / "alone", 0))
    seen = on_ranks(compute, (folder, tmp_path / "shared", 0), tmp_path, world=2)
    assert sum(seen) == COUNT
    assert min(seen) > 0.3 * COUNT
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_a_command_killed_at_any_moment_is_resumed_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    folder = write(tmp_path / "images")
    compute(SINGLE_PROCESS, (folder, tmp_path / "whole", 0))
    (process,) = start_ranks(compute, (folder, tmp_path / "parts", 0.05), tmp_path, 1)
    while not list(tmp_path.glob("parts/*/blocks/*.npz")):
        assert process.is_alive()
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (place,) = (tmp_path / "parts").iterdir()
    left = Blocks(place / "blocks", COUNT, 3).count(Blocks(place / "blocks", COUNT, 3).ranges())
    assert compute(SINGLE_PROCESS, (folder, tmp_path / "parts", 0)) == COUNT - left < COUNT
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_statistics_are_read_as_they_were_written(tmp_path: Path) -> None:
    mu, sigma = torch.randn(5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    feature_cache.write_reference(tmp_path / "a.npz", mu, sigma, {"images": 3, "source": "ünïcode"})
    found = feature_cache.read_reference(tmp_path / "a.npz")
    assert torch.equal(found.mu, mu)
    assert torch.equal(found.sigma, sigma)
    assert found.protocol == {"images": 3, "source": "ünïcode"}
