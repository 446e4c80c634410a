"""One side of a comparison: a set of images as the metrics read it, with the sizes and the errors found on reading."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from movq_cli import digests
from movq_cli.console import Console
from movq_cli.data import pixels
from movq_cli.data.filters import FILTER
from movq_cli.data.images import (
    WHITE,
    BadImageError,
    ImageOutOfMemoryError,
    Traits,
    covering_crop,
    decode,
    is_jpeg,
    read_traits,
)
from movq_cli.data.sample_files import MANIFEST, SampleManifest, manifest_of_file
from movq_cli.data.shards import DatasetManifest, SplitName
from movq_cli.data.spacing import evenly_spaced
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.image_size import ImageSize, Resolution
from movq_cli.sources import stream
from movq_cli.sources.kinds.prepared import PreparedReader
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source

NO_JPEG, JPEG = 1, 2
"""Formats of images, by their content."""


class Policy(NamedTuple):
    """How the images of a set were decoded, where several ways are possible."""

    background: tuple[int, int, int]  # color behind transparent pixels, RGB in 0..255
    orientation: bool  # whether images are turned upright as their EXIF data says
    white: int  # value of white in gray images of 16 bits


class Size(NamedTuple):
    """Size of an image as it is stored, before any crop, in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class ReadReport:
    """The results of reading one rank's share of a set, apart from the pixels."""

    sizes: NDArray[np.int32]
    """Width and height of each image [N, 2]; 0 for one that was not or could not be read."""
    formats: NDArray[np.uint8]
    """Format of each image [N]; 0 where it is unknown."""
    unreadable: Mapping[int, str]
    """The reason why each corrupt image cannot be used, by its index."""


class ImageSet:
    """A set of images to measure.

    Args:
        role: "real" or "fake".
        location: Folder, archive, .npz file of pixels, prepared set, or the name of a data set.
        split: Split to read where the set has splits.
        crop: Size of the central part to read, after the image has been resized to the smallest size that covers it;
            None reads images as they are.
        background: Color that transparent pixels are composited over, RGB in 0..255.
        limit: Largest number of images to read, evenly spaced over the set; None reads all.
        strict: Whether a corrupt image is an error; otherwise it is left out with a warning.
        console: Console for the warnings of corrupt images.

    Raises:
        BadRequestError: There are no images.
    """

    def __init__(
        self,
        role: str,
        location: str,
        split: SplitName,
        *,
        crop: Resolution | None = None,
        background: tuple[int, int, int] = WHITE,
        limit: int | None = None,
        strict: bool = False,
        console: Console,
    ) -> None:
        source = open_source(location).of_split(split)
        for warning in source.warnings:
            console.warn(f"{role}: {warning}")
        self.source: Source = source if limit is None else source.take(evenly_spaced(len(source), limit))
        self.role = role
        self.location = location
        self.split: SplitName | None = split if self.source.splits is not None else None
        self.crop = None if crop is None else ImageSize.of(crop)
        self.background = background
        self.strict = strict
        self.sizes: NDArray[np.int32] = np.zeros((len(self.source), 2), np.int32)
        self.unreadable: dict[int, str] = {}
        self.formats: NDArray[np.uint8] = np.zeros(len(self.source), np.uint8)
        """`NO_JPEG` or `JPEG` for each image [N] whose content was read; 0 where it is unknown."""
        self._console = console

    def __len__(self) -> int:
        return len(self.source)

    @property
    def names(self) -> tuple[str, ...]:
        """Relative paths of the images, sorted."""
        return self.source.names

    @property
    def prepared(self) -> DatasetManifest | None:
        """The manifest of a set that `movq prepare` made; None for other sets."""
        return DatasetManifest.read(Path(self.location)) if isinstance(self.source.reader, PreparedReader) else None

    @cached_property
    def policy(self) -> Policy:
        """How the images are decoded: by `movq prepare` in a prepared set, otherwise here."""
        prepared = self.prepared
        if prepared is None:
            return Policy(self.background, True, _WHITE_OF_16_BITS)
        return Policy(prepared.background, prepared.orientation, prepared.white or _WHITE_OF_16_BITS)

    def count_traits(self) -> Traits:
        """Return the number of images with each trait; every file is read. None of a prepared set has one."""
        total = np.zeros(len(Traits._fields), int)
        if self.prepared is None:
            for _, traits in stream.mapped(self.source, range(len(self)), read_traits):
                total += (0, 0, 0) if isinstance(traits, BadImageError) else traits
        return Traits(*total.tolist())

    @property
    def jpeg_share(self) -> float | None:
        """Share of the images whose content is JPEG; None if the content of none was read."""
        known = int((self.formats > 0).sum())
        if self.prepared is not None:
            return 0.0
        return float((self.formats == JPEG).sum() / known) if known else None

    @property
    def sampled_mode(self) -> str | None:
        """The mode of the prior that drew the images of a set of samples; None if no manifest says it."""
        return self._sampled[0]

    @property
    def sampled_classes(self) -> Counter[str]:
        """The number of images of each class in a set of samples; empty if no manifest says it."""
        return self._sampled[1]

    @cached_property
    def _sampled(self) -> tuple[str | None, Counter[str]]:
        """Mode and classes from the manifest that `movq sample` wrote into its folder or beside its file.

        The manifest itself, with an entry for each image, would take more memory.
        """
        mode, classes = None, Counter[str]()
        path = Path(self.location)
        path = path / MANIFEST if path.is_dir() else manifest_of_file(path)
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, BadRequestError):
            manifest = json.loads(digests.read_json(path, "", SampleManifest.max_bytes)[0])
            classes = Counter(str(image["class"]) for image in manifest["images"] if image["class"] is not None)
            mode = str(manifest["settings"]["mode"])
        return mode, classes

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, Tensor | None]]:
        """Yield each index with its pixels, uint8 [3, H, W], or with None for a corrupt image.

        Args:
            indices: Indices of the images, in the order in which they are read.

        Raises:
            FailureError: An image of a strict set is corrupt, or the memory does not suffice for an image.
        """
        for index, found in stream.mapped(self.source, indices, self._decode):
            if isinstance(found, ImageOutOfMemoryError):
                raise FailureError(
                    f"{self.role}: {found} at {self.names[index]} in {self.location}", "Resize it, or leave it out."
                )
            if isinstance(found, BadImageError):
                self.leave_out(index, str(found))
                yield index, None
            else:
                image, self.sizes[index], self.formats[index] = found
                yield index, image

    def leave_out(self, index: int, reason: str) -> None:
        """Record an image as corrupt, and warn of it once.

        Args:
            index: Index of the image.
            reason: What is wrong with it.

        Raises:
            FailureError: The set is strict.
        """
        if self.strict:
            remedy = "Remove or replace it, or leave --strict out."
            raise FailureError(f"{self.role}: cannot read {self.names[index]} in {self.location}: {reason}", remedy)
        if index not in self.unreadable:
            self._console.warn(f"{self.role}: left out {self.names[index]}: {reason}")
        self.unreadable[index] = reason

    def read_report(self) -> ReadReport:
        """Return what this process found on reading, to be sent to other ranks."""
        return ReadReport(self.sizes, self.formats, self.unreadable)

    def add_report(self, report: ReadReport) -> None:
        """Add what another rank found on reading.

        Raises:
            FailureError: It found a corrupt image, and the set is strict.
        """
        self.add_sizes(report.sizes)
        np.copyto(self.formats, report.formats, where=report.formats > 0)
        for index, reason in report.unreadable.items():
            self.leave_out(index, reason)

    def add_sizes(self, sizes: NDArray[np.int32]) -> None:
        """Add sizes that were found by another process, or earlier.

        Args:
            sizes: Width and height of each image [N, 2]; 0 where they are unknown.
        """
        np.copyto(self.sizes, sizes, where=sizes > 0)

    def size_counts(self) -> Counter[Size]:
        """Return the number of images of each size, in the order of the first image of that size."""
        read = self.sizes[self.sizes[:, 0] > 0]
        sizes, firsts, counts = np.unique(read, axis=0, return_index=True, return_counts=True)
        return Counter({Size(*sizes[row].tolist()): int(counts[row]) for row in np.argsort(firsts)})

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of all that the metrics depend on: the bytes of the images, in the order of names, and the crop.

        For a prepared set the hash in its manifest and the names are hashed; for every other set each file is read.
        """
        background = "" if self.background == WHITE or self.prepared is not None else f" {self.background}"
        digest = hashlib.sha256(f"{self.crop} {FILTER if self.crop else ''}{background}\n".encode())
        if self.source.content_hash is not None:
            digest.update("\n".join([self.source.content_hash, *self.names]).encode(errors="surrogateescape"))
            return digest.hexdigest()
        with self._console.progress(len(self), f"hashing {self.role}", "images") as progress:
            for index, found in stream.mapped(self.source, range(len(self)), _digest):
                if isinstance(found, BadImageError):
                    digest.update(b"unreadable")
                else:
                    digest.update(found[0])
                    self.formats[index] = found[1]
                progress.advance()
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return this side's entry in the protocol."""
        sizes = self.size_counts()
        prepared = self.prepared
        return {
            "source": self.location,
            "split": self.split,
            "images": len(self),
            "unreadable": [self.names[index] for index in sorted(self.unreadable)],
            "sizes": {f"{size.width}x{size.height}": count for size, count in sizes.most_common(5)},
            "distinct_sizes": len(sizes),
            "crop": self._describe_crop(),
            "prepared": prepared and prepared.model_dump(include={"hash", "filter", "size", "square", "orientation"}),
            "background": list(self.policy.background),
        }

    def _describe_crop(self) -> dict[str, Any] | None:
        if self.crop is None:
            return None
        sides = {"side": self.crop.height} if self.crop.is_square else self.crop._asdict()
        return {**sides, "filter": FILTER}

    def _decode(self, data: bytes) -> tuple[Tensor, Size, int]:
        image = decode(data, background=self.background)
        size = Size(*image.size)
        if self.crop is not None:
            image = covering_crop(image, self.crop)
        return pixels.from_array(np.asarray(image)), size, _format(data)


_WHITE_OF_16_BITS = 65535


def _digest(data: bytes) -> tuple[bytes, int]:
    return hashlib.sha256(data).digest(), _format(data)


def _format(data: bytes) -> int:
    return JPEG if is_jpeg(data) else NO_JPEG
