"""A set of images counts the sizes of those that could be read, whoever has read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from movq_cli.console import Console
from movq_cli.evaluation.image_sets import ImageSet


def image_set(folder: Path) -> ImageSet:
    """A set of images of three sizes, of which 1.png is corrupt."""
    folder.mkdir(exist_ok=True)
    for index, size in enumerate([(9, 8), None, (8, 9), (9, 8), (300, 8), (8, 9), (9, 8)]):
        path = folder / f"{index}.png"
        if size is None:
            path.write_bytes(b"no image")
        else:
            Image.new("RGB", size).save(path)
    return ImageSet("real", str(folder), "train", console=Console(quiet=True, mute=True))


def test_only_images_that_could_be_read_have_a_size(tmp_path: Path) -> None:
    images = image_set(tmp_path / "images")
    assert images.size_counts() == {}
    for _ in images.read(range(5)):
        pass
    assert images.size_counts() == {(9, 8): 2, (8, 9): 1, (300, 8): 1}
    assert images.describe()["sizes"] == {"9x8": 2, "8x9": 1, "300x8": 1}
    assert images.describe()["unreadable"] == ["1.png"]


def test_sizes_of_several_processes_are_those_of_one(tmp_path: Path) -> None:
    alone, first, second = (image_set(tmp_path / "images") for _ in range(3))
    for images, indices in ((alone, range(7)), (first, range(3)), (second, range(3, 7))):
        for _ in images.read(indices):
            pass
    for one, other in ((first, second), (second, first)):
        one.add_report(other.read_report())
        assert np.array_equal(one.sizes, alone.sizes)
        assert one.describe() == alone.describe()
