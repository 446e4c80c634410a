"""Tar archives of images: one, a folder of them, or a range of numbers, as WebDataset uses them."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.images import IMAGE_SUFFIXES
from movq_cli.data.shards import SPLITS, SplitName
from movq_cli.errors import BadRequestError
from movq_cli.files import PositionalFiles
from movq_cli.sources.kinds.archive import member_names
from movq_cli.sources.kinds.folder import walk
from movq_cli.sources.kinds.prepared import is_prepared
from movq_cli.sources.labels import HELD_OUT, TRAIN, is_image, source_of_names
from movq_cli.sources.source import Source, SourceKind, check_bytes, register
from movq_cli.sources.temporary import decompressed_copy

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CLASS_SUFFIXES = frozenset(["cls", "json"])
_MAX_CLASS_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class TarReader:
    """Reads the members of uncompressed tars by their offsets."""

    paths: tuple[Path, ...]
    extents: NDArray[np.int64]  # [N, 3]: number of the tar, offset and length in bytes
    files: PositionalFiles = field(default_factory=PositionalFiles)

    def read(self, member: int) -> bytes:
        """Return the bytes of a member."""
        tar, offset, length = self.extents[member].tolist()
        check_bytes(length)
        return self.files.read(self.paths[tar], offset, length)


class TarListing(NamedTuple):
    """The files in several tars, those of one tar after those of another."""

    names: list[str]
    extents: NDArray[np.int64]  # [N, 3]: number of the tar, offset and length in bytes
    labels: list[int]  # class from the file of the same key, or -1 where there is none


def expand_range(pattern: str) -> list[str]:
    """Return the names that a pattern such as `train-{0000..0009}.tar` stands for.

    Numbers are padded with zeros to the width of the first one. A name without a range stands for itself.
    """
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    names = (f"{pattern[: found.start()]}{n:0{len(found[1])}}{pattern[found.end() :]}" for n in numbers)
    return [name for part in names for name in expand_range(part)]


def list_files(tars: Sequence[Path], prefixes: Sequence[str]) -> TarListing:
    """List the files in uncompressed tars; links, devices and sparse files are left out.

    Args:
        tars: Paths of the tars.
        prefixes: For each tar the text that is put before the names of its files.

    Raises:
        OSError: A tar cannot be read.
        tarfile.TarError: A tar is damaged.
    """
    names: list[str] = []
    extents: list[tuple[int, int, int]] = []
    keys: list[tuple[int, str]] = []
    classes: dict[tuple[int, str], int] = {}
    for number, (path, prefix) in enumerate(zip(tars, prefixes, strict=True)):
        with tarfile.open(path, "r:") as archive:
            for member in _regular_members(archive):
                key, suffix = _split_key(member.name)
                if suffix in _CLASS_SUFFIXES:
                    with suppress(ValueError, KeyError, TypeError):
                        classes[number, key] = _read_class(archive, member, suffix)
                else:
                    names.append(prefix + member.name)
                    extents.append((number, member.offset_data, member.size))
                    keys.append((number, key))
    labels = [classes.get(key, -1) for key in keys] if classes else [-1] * len(keys)
    return TarListing(names, np.array(extents, np.int64).reshape(-1, 3), labels)


def _regular_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members whose content is in the archive in one piece; that of links and sparse files is not."""
    while (member := archive.next()) is not None:
        if member.isreg() and not member.issparse():
            yield member
        # The library caches one kilobyte for each member: a gigabyte for a million files.
        archive.members.clear()  # type: ignore[attr-defined]


def _split_key(name: str) -> tuple[str, str]:
    """Split a member's path as WebDataset does: up to the first dot of the file name, and the suffix after it."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}", suffix.lower()


def _read_class(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> int:
    file = archive.extractfile(member)
    assert file is not None
    text = file.read(_MAX_CLASS_BYTES)
    label = int(json.loads(text)["label"] if suffix == "json" else text)
    if label < 0:
        raise ValueError(label)
    return label


def _split_of(path: Path) -> SplitName | None:
    """Return the split that the words of a tar's name give, such as `imagenet1k-validation-03.tar`."""
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    return "train" if TRAIN in words else "val" if words & HELD_OUT else None


def _uncompressed(path: Path) -> Path:
    """Return the tar itself, or for random access a decompressed copy that is removed when this process ends."""
    try:
        with tarfile.open(path, "r:"):
            return path
    except tarfile.ReadError:
        pass
    with tarfile.open(path, "r:*") as archive:
        assert archive.fileobj is not None
        archive.fileobj.seek(0)
        return decompressed_copy(path, archive.fileobj.read, ".tar")


def _open_tars(location: str, paths: Sequence[Path]) -> Source:
    for path in paths:
        if not tarfile.is_tarfile(path):
            raise BadRequestError(f"{path} is neither an image, nor a zip or tar archive, or it is damaged")
    plain = [_uncompressed(path) for path in paths]
    are_several = len(paths) > 1
    # Several tars may hold files of the same names.
    listing = list_files(plain, [f"{path.stem}/" if are_several else "" for path in paths])
    source = source_of_names(location, listing.names, TarReader(tuple(plain), listing.extents))
    if are_several:
        splits = [_split_of(paths[tar]) for tar in listing.extents[list(source.members), 0]]
        known = tuple(split for split in splits if split is not None)
        is_split = len(known) == len(splits) and len(set(known)) == len(SPLITS)
        source = replace(source, labels=None, classes=(), splits=known if is_split else None)
    labels = tuple(listing.labels[member] for member in source.members)
    if min(labels) < 0:
        return source
    return replace(source, labels=labels, classes=tuple(map(str, range(max(labels) + 1))))


def _tars_in(path: Path) -> list[str]:
    """Return the tars in a folder that holds tars and no images, in ascending order."""
    tars: list[str] = []
    for name in walk(path):
        if is_image(name):
            return []
        if PurePosixPath(name).suffix.lower() == ".tar":
            tars.append(name)
    return sorted(tars)


def _is_folder_of_tars(_: str, path: Path) -> bool:
    return path.is_dir() and not is_prepared(path) and bool(_tars_in(path))


def _is_range(location: str, path: Path) -> bool:
    return _RANGE.search(location) is not None and not path.exists()


def _may_be_tar(_: str, path: Path) -> bool:
    is_other = path.suffix.lower() in IMAGE_SUFFIXES | {".txt"}
    return path.exists() and not path.is_dir() and not is_other and member_names(path) is None


register(
    SourceKind(
        _is_folder_of_tars,
        lambda location, path: _open_tars(location, [path / name for name in _tars_in(path)]),
    )
)
register(
    SourceKind(
        _is_range,
        lambda location, _: _open_tars(location, [Path(name) for name in expand_range(location)]),
    )
)
register(SourceKind(_may_be_tar, lambda location, path: _open_tars(location, [path]), is_fallback=True))
