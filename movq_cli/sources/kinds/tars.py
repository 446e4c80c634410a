"""Tar archives: plain ones, and shards of WebDataset, in which the files of one key belong together."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.shards import SPLITS
from movq_cli.errors import BadRequestError
from movq_cli.files import PositionalFiles
from movq_cli.sources.labels import assemble, split_of
from movq_cli.sources.source import Source, SourceKind, check_bytes
from movq_cli.sources.temporary import extract_copy

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CLASS_SUFFIXES = frozenset(["cls", "json"])
_MAX_CLASS_BYTES = 2**20


class TarKind(SourceKind):
    """Any file that no other kind takes, which must be a tar; or tars by a range of numbers, `{0000..0009}.tar`."""

    is_fallback = True

    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether the path is a file, or the location has a range of numbers."""
        return _RANGE.search(location) is not None if path is None else not path.is_dir()

    def open(self, location: str, path: Path | None) -> Source:
        """List the images of the tars."""
        return open_tars(location, [path] if path is not None else [Path(name) for name in _expand(location)])


def open_tars(location: str, paths: Sequence[Path]) -> Source:
    """List the images in tars, compressed or not.

    Args:
        location: Location as the user gave it.
        paths: The tars. The files of several tars are named after their tar too, because names may repeat.

    Returns:
        The source. Labels come from WebDataset's `.cls` and `.json` files if each image has one, else from the class
        folders of a single tar; splits come from the names of several tars.

    Raises:
        BadRequestError: A file is not a tar, or there is no image.
        FailureError: There is no room for a decompressed copy.
    """
    for path in paths:
        if not tarfile.is_tarfile(path):
            raise BadRequestError(f"{path} is neither an image, nor a zip or tar archive, or it is damaged")
    uncompressed = [_uncompressed(path) for path in paths]
    are_several = len(paths) > 1
    files = _list_files(uncompressed, [f"{path.stem}/" if are_several else "" for path in paths])
    source = assemble(location, files.names, TarReader(tuple(uncompressed), files.extents))
    if are_several:
        split_of_tar = [split_of(path) for path in paths]
        splits = [split_of_tar[number] for number in files.extents[list(source.members), 0]]
        known = tuple(split for split in splits if split is not None)
        has_splits = len(known) == len(splits) and len(set(known)) == len(SPLITS)
        source = replace(source, labels=None, classes=(), splits=known if has_splits else None)
    labels = tuple(files.labels[member] for member in source.members)
    if min(labels) < 0:
        return source
    return replace(source, labels=labels, classes=tuple(map(str, range(max(labels) + 1))))


@dataclass(frozen=True, eq=False)
class TarReader:
    """The files in uncompressed tars, read by their offsets."""

    paths: tuple[Path, ...]
    extents: NDArray[np.int64]  # [N, 3]: index of the tar, offset in it, length; the last two in bytes
    files: PositionalFiles = field(default_factory=PositionalFiles)

    def read(self, member: int) -> bytes:
        """Return the bytes of a file."""
        tar, offset, length = self.extents[member].tolist()
        check_bytes(length)
        return self.files.read(self.paths[tar], offset, length)


class _TarFiles(NamedTuple):
    """The files in several tars, in the order of the tars."""

    names: list[str]
    extents: NDArray[np.int64]  # as for `TarReader`
    labels: list[int]  # label in the class file of the same key; -1 = there is none


def _list_files(tars: Sequence[Path], prefixes: Sequence[str]) -> _TarFiles:
    """List the regular files in uncompressed tars, each tar's with a prefix before their names."""
    names: list[str] = []
    extents: list[tuple[int, int, int]] = []
    keys: list[tuple[int, str]] = []
    labels: dict[tuple[int, str], int] = {}
    for number, (path, prefix) in enumerate(zip(tars, prefixes, strict=True)):
        with tarfile.open(path, "r:") as archive:
            for member in _regular_files(archive):
                key, suffix = _key_and_suffix(member.name)
                if suffix in _CLASS_SUFFIXES:
                    with suppress(ValueError, KeyError, TypeError):
                        labels[number, key] = _read_label(archive, member, suffix)
                else:
                    names.append(prefix + member.name)
                    extents.append((number, member.offset_data, member.size))
                    keys.append((number, key))
    return _TarFiles(names, np.array(extents, np.int64).reshape(-1, 3), [labels.get(key, -1) for key in keys])


def _regular_files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield all members but links and devices, which hold no bytes, and sparse files, whose bytes are scattered."""
    while (member := archive.next()) is not None:
        if member.isreg() and not member.issparse():
            yield member
        # Else the archive would store a kilobyte for each member, a gigabyte for a million files.
        archive.members.clear()  # type: ignore[attr-defined]


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split a name as WebDataset does: the path up to the first dot of the file's name, and what follows that dot."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}", suffix.lower()


def _read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> int:
    file = archive.extractfile(member)
    assert file is not None
    text = file.read(_MAX_CLASS_BYTES)
    label = int(json.loads(text)["label"] if suffix == "json" else text)
    if label < 0:
        raise ValueError(label)
    return label


def _uncompressed(path: Path) -> Path:
    """Return the tar itself, or a decompressed copy of it, which allows random access."""
    try:
        with tarfile.open(path, "r:"):
            return path
    except tarfile.ReadError:
        pass
    with tarfile.open(path, "r:*") as archive:
        assert archive.fileobj is not None
        archive.fileobj.seek(0)
        return extract_copy(path, archive.fileobj.read, ".tar")


def _expand(pattern: str) -> list[str]:
    """Return the names that a range of numbers stands for, with as many digits as its first number has."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    names = (f"{pattern[: found.start()]}{n:0{len(found[1])}}{pattern[found.end() :]}" for n in numbers)
    return [name for part in names for name in _expand(part)]


KIND = TarKind()
