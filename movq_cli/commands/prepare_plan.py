"""The plan of a prepared set: everything that decides its bytes, and the work of making one shard."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from movq_cli.data import frames, png
from movq_cli.data.filters import FILTER
from movq_cli.data.images import (
    MAX_PIXELS,
    WHITE,
    BadImageError,
    center_crop,
    check_stored_size,
    decode,
    resize_to_cover,
)
from movq_cli.data.shard_writer import Entry, Reject, ShardReport, inspect_shard, write_shard
from movq_cli.data.shards import SHARD_IMAGES, SPLITS, SplitName, member_name, shard_name, shard_path
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.image_size import Resolution
from movq_cli.sources.source import Source

DEFAULT_MAX_SIDE = 256
"""Largest short side of images for which no size is requested, pixels; larger images are reduced to it."""


@dataclass(frozen=True)
class Preprocessing:
    """The operations on one image."""

    size: Resolution | None = None
    """Short side of the stored images in pixels, or the height and width to which all of them are cropped; None keeps
    the image's own short side, at most `DEFAULT_MAX_SIDE`."""
    square: bool = False
    """Whether the central square is cut out after resizing to a short side."""
    upscale: bool = False
    """Whether smaller images are enlarged; otherwise they are rejected."""
    background: tuple[int, int, int] = WHITE
    """Color that transparent pixels are composited over, RGB in 0..255."""
    orientation: bool = True
    """Whether images are turned upright as their EXIF data says."""
    compression: png.Compression = "none"
    """Compression of the stored PNG files."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of a source image; larger ones are rejected."""
    filter: str = FILTER
    """Filter with which images are resized, one of `filters.FILTERS`."""
    white: int | None = None
    """Value of white in gray images of 16 bits; larger values are white too. None = 65535."""

    def apply(self, data: bytes) -> Image.Image:
        """Decode, resize and crop an image file.

        Raises:
            BadImageError: The image cannot be used; the text says why.
        """
        image = decode(
            data,
            background=self.background,
            orientation=self.orientation,
            max_pixels=self.max_pixels,
            white=self.white,
        )
        size = self.size or min(DEFAULT_MAX_SIDE, *image.size)
        image = resize_to_cover(image, size, upscale=self.upscale, filter_name=self.filter)
        image = center_crop(image, size) if self.square or isinstance(size, tuple) else image
        check_stored_size(*image.size)
        return image

    def as_settings(self) -> dict[str, Any]:
        """Return the settings by name; without those of later versions unless they are changed."""
        later = {"max_pixels": MAX_PIXELS, "white": None}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}

    def accepts(self, source: Source, index: int) -> bool:
        """Return whether an image of a source can be used."""
        try:
            self.apply(source.read(index))
        except BadImageError:
            return False
        return True


class Shard(NamedTuple):
    """A unit of work: at most `SHARD_IMAGES` source images of a split."""

    split: SplitName
    number: int
    indices: tuple[int, ...]  # indices of the images in the source

    @property
    def name(self) -> str:
        """Path of the shard's file from the set's folder on."""
        return shard_name(self.split, self.number)


class MadeShard(NamedTuple):
    """A shard that exists."""

    report: ShardReport
    several: tuple[str, ...] = ()
    """Names of the images whose files hold further pages or frames, if the shard was made now."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of a prepared set; each shard is a pure function of it."""

    source: Source
    out: Path
    """Folder of the set."""
    preprocessing: Preprocessing
    shards: tuple[Shard, ...]
    duplicates: Mapping[int, int] | None
    """Images that are left out because they equal an earlier file, and the index of that file; None = not searched."""
    is_shared: bool
    """Whether other processes may be making shards of the same set."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Digest of each shard by its name, if the set was finished: another shard under its name is made again."""

    def make_shard(self, number: int) -> MadeShard:
        """Make one of the shards, unless it exists undamaged, and report what its file holds.

        Raises:
            FailureError: The file could not be written.
        """
        shard = self.shards[number]
        path = shard_path(self.out, shard.split, shard.number)
        try:
            report = inspect_shard(path, [self.source.names[index] for index in shard.indices])
            if self.digests.get(shard.name, report.digest) == report.digest:
                return MadeShard(report)
        except BadRequestError:
            pass
        several: list[str] = []
        images = (self.make_image(shard, index, several) for index in shard.indices)
        write_shard(path, images, concurrent=self.is_shared)
        return MadeShard(inspect_shard(path), tuple(several))

    def finished_shards(self) -> set[str]:
        """Return the names of the shards that exist."""
        # The folder is listed, because a network file system may cache for a while that a file did not exist.
        found = {f"{split}/{path.name}" for split in SPLITS for path in (self.out / split).glob("*.zip")}
        return found & {shard.name for shard in self.shards}

    def part(self, job: int, jobs: int) -> Plan:
        """Return a plan with every `jobs`-th shard only.

        Args:
            job: Number of the job, from 0 or from 1.
            jobs: Number of jobs.
        """
        return replace(self, shards=self.shards[job % jobs :: jobs])

    def encode(self) -> str:
        """Return the content of `plan.json`: equal for equal plans, and different for all others."""
        path = Path(self.source.location)
        settings = {
            "format": 1,
            "source": str(path.resolve()) if path.exists() else self.source.location,
            "filter": FILTER,  # in this place, so that plans of earlier versions stay the same
            **self.preprocessing.as_settings(),
            "drop_duplicates": self.duplicates is not None,
        }
        content = [
            *(settings, self.source.names, self.source.labels, self.source.classes),
            *(self.shards, self.duplicates),
        ]
        fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return json.dumps({**settings, "images": len(self.source), "fingerprint": fingerprint}, indent=2) + "\n"

    def make_image(self, shard: Shard, index: int, several: list[str]) -> Entry | Reject:
        """Make one image of a shard, or say why it is rejected.

        Args:
            shard: The shard.
            index: Index of the image in the source, one of the shard's.
            several: List to which the image's name is appended if its file holds further pages or frames.
        """
        name, labels = self.source.names[index], self.source.labels
        if self.duplicates and index in self.duplicates:
            return Reject(name, f"the same file as {self.source.names[self.duplicates[index]]}")
        try:
            file = self.source.read(index)
            image = self.preprocessing.apply(file)
        except BadImageError as error:
            return Reject(name, str(error))
        except MemoryError:
            raise FailureError(
                f"out of memory at the image {name}",
                "Set fewer --workers, or a smaller --max-pixels, which rejects larger images.",
            ) from None
        if frames.has_several(file):
            several.append(name)
        data = png.encode(np.asarray(image), self.preprocessing.compression)
        number = shard.number * SHARD_IMAGES + bisect_left(shard.indices, index)
        return Entry(member_name(number), data, None if labels is None else labels[index], name)


def cut_into_shards(splits: Mapping[SplitName, Sequence[int]]) -> tuple[Shard, ...]:
    """Cut the images of each split into shards.

    Args:
        splits: Indices of each split's images in the source.
    """
    return tuple(
        Shard(split, number, tuple(indices[start : start + SHARD_IMAGES]))
        for split, indices in splits.items()
        for number, start in enumerate(range(0, len(indices), SHARD_IMAGES))
    )
