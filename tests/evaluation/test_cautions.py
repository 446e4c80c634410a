"""A report says where its figures would mislead, and says nothing where they do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet, SplitName
from movq_cli.errors import FailureError
from movq_cli.evaluation import cautions, metrics
from movq_cli.evaluation.image_sets import ImageSet
from tests.conftest import edit_header


def write(folder: Path, names: Sequence[str], side: int = 16, width: int | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((side, width or side, 3), np.uint8)).save(folder / name)
    return folder


def images(
    role: str, folder: Path, split: SplitName = "val", *, crop: int | None = None, strict: bool = False
) -> ImageSet:
    found = ImageSet(role, str(folder), split, crop=crop, strict=strict, console=Console(quiet=True))
    for _ in found.read(range(len(found))):
        pass
    return found


def said(real: ImageSet, fake: ImageSet, *keys: str) -> str:
    """Return all warnings of two sets, by the metrics that are named."""
    chosen = metrics.requested(keys) if keys else []
    return "\n".join([*cautions.before([real, fake], chosen), *cautions.after([real, fake])])


def test_sets_that_are_alike_are_passed_over_in_silence(tmp_path: Path) -> None:
    a, b = (write(tmp_path / role, ["1.png", "2.png"]) for role in ("real", "fake"))
    assert said(images("real", a), images("fake", b), "psnr") == ""
    assert "real has 2 images, fewer than 2048" in said(images("real", a), images("fake", b), "fid")
    assert "both sides are the same images" in said(images("real", a), images("fake", a / ".." / "real"), "psnr")


def test_jpeg_on_one_side_alone_is_reported(tmp_path: Path) -> None:
    a, b = write(tmp_path / "real", ["1.JPG"]), write(tmp_path / "fake", ["1.png"])
    assert "only the real images are JPEG" in said(images("real", a), images("fake", b))
    assert said(images("real", a), images("fake", write(tmp_path / "more", ["1.jpeg"]))) == ""


def test_sizes_that_differ_are_reported_with_the_crop_that_makes_them_equal(tmp_path: Path) -> None:
    a, b = write(tmp_path / "real", ["1.png"], width=20), write(tmp_path / "fake", ["1.png"])
    line = said(images("real", a), images("fake", b))
    assert "several sizes (real: 20x16; fake: 16x16)" in line
    assert "--crop takes" in line
    assert said(images("real", a, crop=16), images("fake", b, crop=16)) == ""


def test_resizing_is_reported_with_its_filter(tmp_path: Path) -> None:
    a, b = write(tmp_path / "real", ["1.png", "2.png"], side=20), write(tmp_path / "fake", ["1.png"])
    line = said(images("real", a, crop=18), images("fake", b, crop=18))
    assert "2 of 2 real images were resized here to 18 pixels (lanczos): FID depends on the filter" in line
    assert "1 of 1 fake images were resized here to 18 pixels (lanczos), 1 of them enlarged" in line


def test_the_crop_is_the_central_square_of_the_resized_image(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    picture = Image.fromarray(draws.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    ((_, seen),) = ImageSet("real", str(tmp_path / "a.png"), "val", crop=15, console=Console()).read([0])
    expected = picture.resize((25, 15), Image.Resampling.LANCZOS).crop((5, 0, 20, 15))
    assert seen is not None
    assert np.array_equal(seen.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_classes_that_are_not_spread_alike_are_reported(tmp_path: Path) -> None:
    real = write(tmp_path / "real", [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(10)])
    fake = write(tmp_path / "fake", [f"{number:02d}.png" for number in range(20)])

    def drawn(cats: int) -> None:
        drawn = [{"file": "", "seed": 0, "class": "cat" if number < cats else "dog"} for number in range(20)]
        (fake / "manifest.json").write_text(json.dumps({"settings": {}, "images": drawn}))

    drawn(10)
    assert said(images("real", real), images("fake", fake)) == ""
    drawn(13)
    assert "different shares of classes (cat: real 50.0%, fake 65.0%)" in said(
        images("real", real), images("fake", fake)
    )
    (fake / "manifest.json").write_text("[]")
    assert said(images("real", real), images("fake", fake)) == ""


def test_a_training_split_under_reconstructions_and_other_filters_are_reported(prepared: PreparedSet) -> None:
    train, val = images("real", prepared.root, "train"), images("fake", prepared.root, "val")
    assert "is its train split" in said(train, val, "fid", "psnr")
    assert "is its train split" not in said(train, val, "fid")
    assert "filters" not in said(train, val)
    path = prepared.root / "manifest.json"
    manifest = path.read_text()
    old = images("real", prepared.root, "train")
    edit_header(path, filter="box")
    assert old.prepared is not None
    assert old.prepared.filter == "box"
    path.write_text(manifest)


def test_a_corrupt_image_ends_a_strict_set(tmp_path: Path) -> None:
    folder = write(tmp_path / "real", ["1.png"])
    (folder / "2.png").write_bytes(b"")
    assert images("real", folder).unreadable == {1: "empty file"}
    with pytest.raises(FailureError, match=r"cannot read 2\.png.*empty file.*--strict"):
        images("real", folder, strict=True)
