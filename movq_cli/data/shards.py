"""The prepared set: a folder of shards with random access for training, which other tools can open too.

    OUT/manifest.json      description of the set, written last: a set without it is unfinished
    OUT/plan.json          settings and fingerprint of the set, written first
    OUT/sources.json       names, sizes and times of change of the source images
    OUT/rejects.jsonl      every rejected image with the reason
    OUT/train/00000.zip    uncompressed zip of PNGs, `00000/img00000042.png` ..., and `dataset.json`
    OUT/val/00000.zip

The format is zip, because a million small files are slow to list, copy and open on the file systems of clusters; a tar
has no directory, so that it allows no random access; and LMDB and WebDataset need a library. An uncompressed zip has
an index of plain offsets, every desktop opens it, and the names and labels are those of NVIDIA's `dataset_tool.py`, so
that the StyleGAN tools read each shard as it is. The images are PNGs, because a tokenizer must not learn the block
artifacts of JPEG.

The PNGs are not compressed by default. A photograph of 256 x 256 pixels then takes 197 kB (as with NVIDIA's tool); it
takes 126 kB at zlib's level 1 with the difference to the row above, and 121 kB with Pillow's best compression. One core
reads and decodes these in 0.12, 0.9 and 2 ms: the first is fast enough for any GPU with one thread, the second is for
large sets on small disks (ImageNet at short side 256: 340 GB and 215 GB), and the third has no advantage.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from movq_cli import digests
from movq_cli.data import png
from movq_cli.data.images import MAX_PIXELS, BadImageError, decode
from movq_cli.data.shard_index import INDEX, SHARD_REMEDY, labels_of, read_index, reading
from movq_cli.digests import Header
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import PositionalFiles
from movq_cli.image_size import ImageSize, Resolution

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

SHARD_IMAGES = 1000
"""Number of source images in a shard: a folder in NVIDIA's naming, some 110 MB at 256 pixels."""

MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
PLAN = "plan.json"
"""File with the settings and the fingerprint of a set, written before the shards."""

SOURCES = "sources.json"
"""File with the names, sizes and times of change of the source images, written after the plan."""

_LOCAL_HEADER = 30  # bytes in the header of a zip member before its name; our members have no extra field

PNG_HEADER = 24
"""Number of bytes of a PNG file up to the end of its width and height."""


class DatasetManifest(Header):
    """Description of a prepared set: its content, and the settings with which it was made."""

    format: Literal[1] = 1
    source: str
    size: Resolution | None  # requested short side, or size of all images; None = their own short side, at most 256
    square: bool
    filter: str
    upscale: bool
    background: tuple[int, int, int]
    orientation: bool
    compression: png.Compression = "zlib"
    max_pixels: int = MAX_PIXELS  # largest number of pixels of a source image
    white: int | None = None  # value of white in gray images of 16 bits; None = 65535
    drop_duplicates: bool = False
    counts: dict[SplitName, int]  # number of images
    shards: dict[SplitName, int]  # number of shards
    classes: tuple[str, ...]  # empty = the images have no labels
    min_side: int  # smallest side of all stored images, pixels
    max_side: int
    rejects: int  # number of rejected images
    hash: str  # hash of the content: SHA-256 over the shards' names and SHA-256s
    digests: dict[str, str] = Field({})  # digest of each shard by its name

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read the manifest of the prepared set in the folder `root`.

        Raises:
            BadRequestError: There is none, or another version wrote it; the message says what to run.
        """
        remedy = f"Run the same `movq prepare SOURCE {root}` again, which writes it again."
        try:
            return digests.read_header(root / MANIFEST, cls, remedy)
        except (FileNotFoundError, NotADirectoryError):
            state = "unfinished: run the same `movq prepare` again" if (root / PLAN).is_file() else "missing"
            raise BadRequestError(f"no prepared set in {root} ({state})", _remedy(root)) from None

    def write(self, root: Path, *, concurrent: bool = False) -> None:
        """Write the manifest into the folder `root`, which makes the set a finished one.

        Args:
            root: Folder of the set.
            concurrent: Whether other processes may write it at the same time.

        Raises:
            FailureError: It could not be written.
        """
        digests.write_header(root / MANIFEST, self, concurrent=concurrent)


def member_name(number: int) -> str:
    """Return the name of an image in its shard, as in NVIDIA's tool: a folder for each thousand images.

    Args:
        number: Number of the image in the plan of its split.
    """
    return f"{number // 1000:05d}/img{number:08d}.png"


def shard_path(root: Path, split: SplitName, shard: int) -> Path:
    """Return the path of a shard.

    Args:
        root: Folder of the set.
        split: Split of the shard.
        shard: Number of the shard in its split.
    """
    return root / shard_name(split, shard)


def shard_name(split: SplitName, shard: int) -> str:
    """Return the name of a shard: its path from the set's folder on."""
    return f"{split}/{shard:05d}.zip"


@dataclass(frozen=True)
class PreparedSet:
    """A finished prepared set on disk."""

    root: Path
    manifest: DatasetManifest

    @classmethod
    def open(cls, root: Path) -> Self:
        """Open a set that `movq prepare` has made.

        Args:
            root: Folder of the set.

        Raises:
            BadRequestError: The set is missing, unfinished, damaged or of another version; the message says what to
                run.
        """
        manifest = DatasetManifest.read(root)
        for split, count in manifest.shards.items():
            for shard in range(count):
                path = shard_path(root, split, shard)
                _check_shard(path, manifest.digests.get(shard_name(split, shard)))
        return cls(root, manifest)

    def smallest_size(self, crop: ImageSize) -> ImageSize:
        """Return the smallest height and the smallest width of the stored images, as a crop is compared with them.

        For a square crop and for images of one size, the manifest has what is needed. Otherwise the header of each
        stored image is read, because the manifest has the smallest side of all images only.

        Args:
            crop: Size that is compared with the result.

        Raises:
            BadRequestError: A shard is damaged, or the shards contradict the manifest.
            FailureError: A shard cannot be read.
        """
        manifest = self.manifest
        side = manifest.min_side
        if isinstance(manifest.size, tuple):
            return ImageSize.of(manifest.size)
        if crop.is_square or manifest.max_side == side or side >= max(crop):
            return ImageSize(side, side)
        sizes = [size for name in SPLITS for size in self.split(name).sizes()]
        return ImageSize(*(min(sides) for sides in zip(*sizes, strict=True)))

    def split(self, name: SplitName) -> Split:
        """Open a split by reading the directories of its shards, which takes a few milliseconds each.

        Raises:
            BadRequestError: A shard is damaged, or the shards contradict the manifest.
        """
        paths = tuple(shard_path(self.root, name, shard) for shard in range(self.manifest.shards[name]))
        split = Split.from_shards(paths, self.manifest.classes)
        if len(split) != self.manifest.counts[name]:
            error = f"{len(split)} images in {name}, not {self.manifest.counts[name]}"
            raise BadRequestError(f"prepared set {self.root} is damaged: {error}", _remedy(self.root))
        return split


@dataclass(frozen=True, eq=False)
class Split:
    """Random access to the images of a split; it can be used in threads and forked processes, and pickled."""

    paths: tuple[Path, ...]  # paths of the shards
    classes: tuple[str, ...]
    labels: NDArray[np.int64] | None  # [N], each below len(classes)
    extents: NDArray[np.int64]  # [N, 4]: shard, offset in bytes, length in bytes, number in the plan
    files: PositionalFiles = field(default_factory=PositionalFiles)

    @classmethod
    def from_shards(cls, paths: tuple[Path, ...], classes: tuple[str, ...]) -> Self:
        """Read the shards' directories.

        Raises:
            BadRequestError: A shard is damaged, or its labels are not those of its images.
        """
        shards = [_read_directory(shard, path, len(classes)) for shard, path in enumerate(paths)]
        extents = np.concatenate([np.empty((0, 4), np.int64), *(extents for extents, _ in shards)])
        labels = [label for _, labels in shards for label in labels]
        return cls(paths, classes, np.array(labels, np.int64) if classes else None, extents)

    def __len__(self) -> int:
        return len(self.extents)

    def name(self, index: int) -> str:
        """Return the name of an image in its shard, which is unique in the split."""
        return member_name(int(self.extents[index, 3]))

    def read(self, index: int) -> bytes:
        """Return the PNG file of an image.

        Raises:
            FailureError: The shard cannot be read.
        """
        return self._read(index, int(self.extents[index, 2]))

    def _read(self, index: int, length: int) -> bytes:
        """Return the first `length` bytes of the PNG file of an image."""
        shard, offset = (int(value) for value in self.extents[index, :2])
        try:
            return self.files.read(self.paths[shard], offset, length)
        except OSError as error:
            raise FailureError(f"cannot read {self.paths[shard]}: {error.strerror}") from error

    def sizes(self) -> Iterator[ImageSize]:
        """Yield the size of each image, from the header of its PNG file.

        Raises:
            BadRequestError: An image is damaged.
            FailureError: A shard cannot be read.
        """
        for index in range(len(self)):
            header = self._read(index, PNG_HEADER)
            with reading(self.paths[int(self.extents[index, 0])]):
                width, height = struct.unpack(">II", header[16:])
            yield ImageSize(height, width)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels of an image, uint8 [H, W, 3], RGB in 0..255, possibly read-only.

        Raises:
            FailureError: The shard cannot be read, or the image is damaged.
        """
        try:
            return decode_stored(self.read(index))
        except BadImageError as error:
            path = self.paths[int(self.extents[index, 0])]
            raise FailureError(f"{self.name(index)} in shard {path} is damaged ({error})", SHARD_REMEDY) from None


def decode_stored(data: bytes) -> NDArray[np.uint8]:
    """Decode a PNG file of a shard, whichever program made it, to uint8 [H, W, 3], possibly read-only.

    Raises:
        BadImageError: The file is damaged.
    """
    pixels = png.decode(data)
    return np.asarray(decode(data, orientation=False)) if pixels is None else pixels


def _read_directory(shard: int, path: Path, classes: int) -> tuple[NDArray[np.int64], list[int]]:
    """Return the extents of a shard's images, as in `Split`, and their labels."""
    with reading(path), zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.filename != INDEX]
        labels = labels_of(read_index(archive), [info.filename for info in members], classes)
        extents = [
            (
                shard,
                info.header_offset + _LOCAL_HEADER + len(info.filename),
                info.file_size,
                int(info.filename[-12:-4]),
            )
            for info in members
        ]
    return np.array(extents, np.int64).reshape(-1, 4), labels


def _check_shard(path: Path, digest: str | None) -> None:
    """Refuse a missing shard, and one whose digest is not that of the manifest; the shard is not read completely.

    Raises:
        BadRequestError: The shard is missing, or it is the shard of another set.
    """
    try:
        stored = digests.stored_in(path)
    except OSError as error:
        raise BadRequestError(f"shard {path} cannot be read: {error.strerror}", SHARD_REMEDY) from None
    if digest is not None and stored != digest:
        raise BadRequestError(f"shard {path} is damaged, or it belongs to another set", SHARD_REMEDY)


def _remedy(root: Path) -> str:
    return f"Make it with `movq prepare SOURCE {root}`."
