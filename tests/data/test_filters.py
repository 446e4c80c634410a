"""VQGAN's filter equals OpenCV's, and the filter of a set is recorded, compared, and part of what it was made with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movq_cli import app
from movq_cli.console import Console
from movq_cli.data import filters
from movq_cli.data.shards import DatasetManifest
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import cautions
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.image_size import ImageSize

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))

OPENCV = {  # first digits of the SHA-256 of cv2.resize(PICTURE, size, interpolation=cv2.INTER_LINEAR); 4.5.5 and 5.0.0
    (17, 13): "3307293c640458ed",
    (16, 12): "25c4a20bf999a743",
    (32, 24): "440e211f9fbd15ea",
    (100, 70): "515aef44fc5b4489",
    (1, 1): "becd5359eaaa7f39",
}


@pytest.mark.parametrize("size", OPENCV)
def test_vqgans_filter_gives_the_bytes_of_opencv(size: tuple[int, int]) -> None:
    pixels = np.asarray(filters.resize(PICTURE, *size, filters.VQGAN))
    assert hashlib.sha256(pixels.tobytes()).hexdigest().startswith(OPENCV[size])


def test_vqgans_filter_equals_an_installed_opencv_at_any_size() -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    rng = np.random.default_rng(1)
    for _ in range(50):
        height, width, new_height, new_width = rng.integers(1, 200, 4).tolist()
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = cv2.resize(pixels, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
        found = filters.resize(Image.fromarray(pixels), new_width, new_height, filters.VQGAN)
        assert np.array_equal(np.asarray(found), expected)


def test_vqgans_filter_reads_only_the_nearest_pixels_and_pillows_filters_read_all() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::8] = 255
    shrunk = {name: np.asarray(filters.resize(Image.fromarray(stripes), 8, 8, name)) for name in filters.FILTERS}
    assert shrunk.pop(filters.VQGAN).max() == 0
    assert all(pixels.min() > 0 for pixels in shrunk.values())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of ten images of 48 x 64 pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def prepare(source: Path, out: Path, *more: str) -> None:
    arguments = ["prepare", str(source), str(out), "--size", "16", "--workers", "1", "--quiet", *more]
    app.app(arguments, standalone_mode=False)


def test_the_filter_is_recorded_and_the_same_set_with_another_filter_is_refused(pictures: Path, tmp_path: Path) -> None:
    prepare(pictures, tmp_path / "set", "--filter", "vqgan")
    assert DatasetManifest.read(tmp_path / "set").filter == "vqgan"
    assert json.loads((tmp_path / "set" / "plan.json").read_text())["filter"] == "vqgan"
    with pytest.raises(BadRequestError, match=r'filter was "vqgan" and is "lanczos"'):
        prepare(pictures, tmp_path / "set")
    with pytest.raises(BadRequestError, match=r"'nearest' is no filter\. Known: .*lanczos, vqgan"):
        prepare(pictures, tmp_path / "other", "--filter", "nearest")


def test_evaluate_warns_of_sets_with_different_filters(pictures: Path, tmp_path: Path) -> None:
    prepare(pictures, tmp_path / "vqgan", "--filter", "vqgan")
    prepare(pictures, tmp_path / "lanczos")

    def side(role: str, path: Path, crop: ImageSize | None = None) -> ImageSet:
        found = ImageSet(role, str(path), "train", crop=crop, strict=False, console=Console(quiet=True))
        list(found.read(range(len(found))))
        return found

    prepared = [side("real", tmp_path / "vqgan"), side("fake", tmp_path / "lanczos")]
    assert [line for line in cautions.before(prepared, []) if "real vqgan, fake lanczos" in line]
    crop = ImageSize(16, 16)
    (resized,) = cautions.after([side("real", tmp_path / "vqgan", crop), side("fake", pictures, crop)])
    assert resized.endswith("resized with vqgan: prepare the fake images with `movq prepare --filter vqgan`")
