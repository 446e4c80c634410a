"""The prepared set: a folder of shards that training reads at random and other tools can open.

    OUT/manifest.json      what the set is, written last: a set without it is unfinished
    OUT/rejects.jsonl      every refused file and why
    OUT/train/00000.zip    uncompressed zip of PNGs, `00000/img00000042.png` ..., and `dataset.json`
    OUT/val/00000.zip

Why zip: a million small files are slow to list, copy and open on the file systems of clusters; a tar has no
directory, so it cannot be read at random; LMDB and webdataset need a library to look inside. An uncompressed
zip is an index followed by plain offsets, every desktop opens it, and names and labels are those of NVIDIA's
`dataset_tool.py`, so the StyleGAN tools read each shard as it is. Why PNG: a tokenizer must not learn JPEG's
blocks.

Why not compressed, unless asked: a photograph of 256 x 256 pixels takes 197 kB so (the size that NVIDIA's tool gives
it too), 126 kB at zlib's level 1 on the difference to the row above, 121 kB as Pillow's best. Read and decoded by one
core it takes 0.12, 0.9 and 2 ms: the first feeds any GPU from one thread, the second is for large sets on small
disks (ImageNet at short side 256: 340 GB and 215 GB), and the third buys nothing.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from movq_cli.data import png
from movq_cli.data.images import BadImageError, decode
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import PositionalFiles, atomic_path, atomic_write, sha256
from movq_cli.settings import Settings

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

SHARD_IMAGES = 1000
"""Source images in a shard: one folder of NVIDIA's naming, some 110 MB at 256 pixels."""

MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
PLAN = "plan.json"
"""Made before the shards: which images go where, and with which settings."""
INDEX = "dataset.json"
"""In each shard: labels as NVIDIA's tools read them, where each image came from, and what was refused."""

_LOCAL_HEADER = 30  # bytes of a zip member's header before its name; ours have no extra field
_PNG_HEADER = 24  # bytes up to the end of a PNG's width and height


class Entry(NamedTuple):
    """An image for a shard."""

    name: str  # as in `member_name`
    data: bytes  # the PNG file
    label: int | None
    source: str  # its name where it came from


class Reject(NamedTuple):
    """An image that was refused."""

    source: str
    reason: str


class ShardReport(NamedTuple):
    """What a finished shard holds."""

    images: int
    rejects: tuple[Reject, ...]
    sides: tuple[int, int] | None  # smallest and largest side, pixels; None without images
    sha256: str  # of the file


class DatasetManifest(Settings):
    """What a prepared set is and how it was made."""

    format: Literal[1] = 1
    source: str
    size: int | None  # short side asked for, pixels; None = the images' own, at most 256
    square: bool
    filter: str
    upscale: bool
    background: tuple[int, int, int]
    orientation: bool
    compression: png.Compression = "zlib"
    drop_duplicates: bool = False
    counts: dict[SplitName, int]  # images
    shards: dict[SplitName, int]
    classes: tuple[str, ...]  # empty without labels
    min_side: int  # of all stored images, pixels
    max_side: int
    rejects: int
    hash: str  # of the content: SHA-256 over the shards' names and SHA-256s

    @classmethod
    def read(cls, root: Path) -> Self:
        """The manifest of the prepared set in `root`.

        Raises:
            BadRequestError: There is none, or another version wrote it; says what to run.
        """
        try:
            return cls.model_validate_json((root / MANIFEST).read_bytes())
        except OSError:
            state = "unfinished: run the same command again" if (root / PLAN).is_file() else "missing"
            raise BadRequestError(f"no prepared set in {root} ({state})", _remedy(root)) from None
        except ValidationError:
            raise BadRequestError(f"{root / MANIFEST} is damaged or of another version", _remedy(root)) from None

    def write(self, root: Path, *, contested: bool = False) -> None:
        """Write it into `root`, which makes the set a finished one.

        Raises:
            FailureError: It could not be written.
        """
        atomic_write(root / MANIFEST, (self.model_dump_json(indent=2) + "\n").encode(), concurrent=contested)


def member_name(number: int) -> str:
    """An image's name inside its shard: NVIDIA's, a folder for each thousand."""
    return f"{number // 1000:05d}/img{number:08d}.png"


def shard_path(root: Path, split: SplitName, shard: int) -> Path:
    """Where a split's shard lies."""
    return root / split / f"{shard:05d}.zip"


def write_shard(path: Path, images: Iterable[Entry | Reject], *, contested: bool = False) -> None:
    """Write a shard, whole or not at all; the same images give the same bytes, whenever and wherever.

    Args:
        path: The zip file to make.
        images: In order of their names, taken one at a time.
        contested: Another process may be writing it too.

    Raises:
        FailureError: It could not be written.
    """
    entries: list[Entry] = []
    rejects: list[Reject] = []
    with (
        atomic_path(path, concurrent=contested) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
    ):
        for image in images:
            if isinstance(image, Reject):
                rejects.append(image)
            else:
                archive.writestr(_member(image.name), image.data)
                entries.append(image._replace(data=image.data[:_PNG_HEADER]))
        archive.writestr(_member(INDEX), json.dumps(_describe(entries, rejects)))


def inspect_shard(path: Path) -> ShardReport:
    """What a finished shard holds, read from the file alone.

    Raises:
        BadRequestError: It is damaged.
    """
    with _reading(path), zipfile.ZipFile(path) as archive:
        index = json.loads(archive.read(INDEX))
        return ShardReport(
            images=len(index["sources"]),
            rejects=tuple(Reject(*reject) for reject in index["rejects"]),
            sides=tuple(index["sides"]) if index["sides"] else None,
            sha256=sha256(path),
        )


def content_hash(reports: Mapping[str, ShardReport]) -> str:
    """One SHA-256 for a set, from its shards' reports by name (`train/00000.zip`)."""
    lines = [f"{name} {reports[name].sha256}\n" for name in sorted(reports)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class PreparedSet:
    """A finished prepared set on disk."""

    root: Path
    manifest: DatasetManifest

    @classmethod
    def open(cls, root: Path) -> Self:
        """Open what `movq prepare` made.

        Raises:
            BadRequestError: Missing, unfinished, damaged or of another version; says what to run.
        """
        manifest = DatasetManifest.read(root)
        for split, count in manifest.shards.items():
            for shard in range(count):
                if not shard_path(root, split, shard).is_file():
                    lost = shard_path(root, split, shard)
                    raise BadRequestError(f"prepared set {root} is damaged: no {lost}", _remedy(root))
        return cls(root, manifest)

    def split(self, name: SplitName) -> Split:
        """Read the directory of a split's shards, a few milliseconds each.

        Raises:
            BadRequestError: A shard is damaged, or the shards do not hold what the manifest says.
        """
        paths = tuple(shard_path(self.root, name, shard) for shard in range(self.manifest.shards[name]))
        split = Split.from_shards(paths, self.manifest.classes)
        if len(split) != self.manifest.counts[name]:
            fault = f"{len(split)} images in {name}, not {self.manifest.counts[name]}"
            raise BadRequestError(f"prepared set {self.root} is damaged: {fault}", _remedy(self.root))
        return split


@dataclass(frozen=True, eq=False)
class Split:
    """Random access to a split's images; may be forked and pickled into workers."""

    paths: tuple[Path, ...]
    classes: tuple[str, ...]
    labels: NDArray[np.int64] | None  # [N], each below len(classes)
    places: NDArray[np.int64]  # [N, 4]: shard, offset in bytes, length in bytes, number in the plan
    files: PositionalFiles = field(default_factory=PositionalFiles)

    @classmethod
    def from_shards(cls, paths: tuple[Path, ...], classes: tuple[str, ...]) -> Self:
        """Read the shards' directories.

        Raises:
            BadRequestError: A shard is damaged.
        """
        shards = [_read_places(shard, path) for shard, path in enumerate(paths)]
        places = np.concatenate([np.empty((0, 4), np.int64), *(places for places, _ in shards)])
        labels = [label for _, labels in shards for label in labels]
        return cls(paths, classes, np.array(labels, np.int64) if classes else None, places)

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """The image's name in its shard, unique in the split."""
        return member_name(int(self.places[index, 3]))

    def read(self, index: int) -> bytes:
        """The image's PNG file.

        Raises:
            FailureError: The shard cannot be read.
        """
        shard, offset, length, _ = (int(value) for value in self.places[index])
        try:
            return self.files.read(self.paths[shard], offset, length)
        except OSError as error:
            raise FailureError(f"cannot read {self.paths[shard]}: {error.strerror}") from error

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """The image as uint8 [H, W, 3], RGB in 0..255, perhaps read-only.

        Raises:
            FailureError: The shard cannot be read, or its bytes are no longer the image that was written.
        """
        try:
            return decode_stored(self.read(index))
        except BadImageError as error:
            path = self.paths[int(self.places[index, 0])]
            remedy = "Remove the set and prepare it again."
            raise FailureError(f"{self.name(index)} in {path} is damaged ({error})", remedy) from None


def decode_stored(data: bytes) -> NDArray[np.uint8]:
    """A shard's image as uint8 [H, W, 3], perhaps read-only, whoever made the PNG.

    Raises:
        BadImageError: It is damaged.
    """
    ours = png.decode(data)
    return np.asarray(decode(data, orientation=False)) if ours is None else ours


def _describe(entries: list[Entry], rejects: list[Reject]) -> dict[str, Any]:
    sides = [side for entry in entries for side in struct.unpack(">II", entry.data[16:24])]
    labels = [[entry.name, entry.label] for entry in entries if entry.label is not None]
    return {
        "labels": labels or None,
        "sources": {entry.name: entry.source for entry in entries},
        "rejects": rejects,
        "sides": [min(sides), max(sides)] if sides else None,
    }


def _member(name: str) -> zipfile.ZipInfo:
    # Time, system and permissions would otherwise be those of the machine and the moment.
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    return info


def _read_places(shard: int, path: Path) -> tuple[NDArray[np.int64], list[int]]:
    with _reading(path), zipfile.ZipFile(path) as archive:
        labels = json.loads(archive.read(INDEX))["labels"]
        members = [info for info in archive.infolist() if info.filename != INDEX]
        places = [
            (
                shard,
                info.header_offset + _LOCAL_HEADER + len(info.filename),
                info.file_size,
                int(info.filename[-12:-4]),
            )
            for info in members
        ]
    return np.array(places, np.int64).reshape(-1, 4), [label for _, label in labels or ()]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a damaged shard raises into a line that names it."""
    try:
        yield
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, struct.error) as error:
        remedy = "Remove it and run the same `movq prepare` again."
        raise BadRequestError(f"shard {path} is damaged ({error})", remedy) from None


def _remedy(root: Path) -> str:
    return f"Make it with `movq prepare SOURCE {root}`."
