"""Tar archives: plain ones, and shards of WebDataset, in which the files of one key belong together."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.array_files import UNREADABLE_ZIP, reason_of
from movq_cli.data.shards import SPLITS
from movq_cli.errors import BadRequestError
from movq_cli.files import PositionalFiles
from movq_cli.sources.labels import assemble, class_numbers, split_of
from movq_cli.sources.source import Source, SourceKind, check_bytes
from movq_cli.sources.temporary import extract_copy

_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_MAX_TARS = 100_000
_CLASS_SUFFIXES = frozenset(["cls", "json"])
_MAX_CLASS_BYTES = 2**20
_MAX_HEADER_BYTES = 2**20
"""Largest size of a header: of a long name, or of the attributes of the pax format."""

_COMPRESSIONS: Mapping[bytes, Callable[[Path], io.BufferedIOBase]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x5d\0\0": lzma.LZMAFile,
}
"""First bytes of compressed files, and how they are read. Each inflates at most as many bytes as are requested."""

_BOMB_REMEDY = "If its images really are that uniform, decompress the archive first."
_BLOCK = 2**20


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
    uncompressed = [_uncompressed(path) for path in paths]
    are_several = len(paths) > 1
    files = _list_files(uncompressed, paths, [f"{path.stem}/" if are_several else "" for path in paths])
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
    name = source.names[labels.index(max(labels))]
    return replace(source, labels=labels, classes=class_numbers(f"the class file of {name} in {location}", max(labels)))


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


def _list_files(tars: Sequence[Path], origins: Sequence[Path], prefixes: Sequence[str]) -> _TarFiles:
    """List the regular files in uncompressed tars.

    Args:
        tars: The uncompressed tars.
        origins: Paths of the tars as the user knows them, for error messages.
        prefixes: For each tar, what stands before the names of its files.

    Raises:
        BadRequestError: A tar is truncated or damaged.
    """
    lists: list[_TarFiles] = []
    for number, (path, prefix) in enumerate(zip(tars, prefixes, strict=True)):
        try:
            lists.append(_list_tar(path, number, prefix))
        except MemoryError:
            raise
        except Exception as error:  # Python's parser raises nearly every type of exception for damaged headers
            raise BadRequestError(f"cannot read the tar archive {origins[number]}: {reason_of(error)}") from None
    names, extents, labels = zip(*lists, strict=True)
    return _TarFiles(list(chain(*names)), np.concatenate(extents), list(chain(*labels)))


def _list_tar(path: Path, number: int, prefix: str) -> _TarFiles:
    """List the regular files in an uncompressed tar, which has a number among several and a prefix for its names."""
    names: list[str] = []
    extents: list[tuple[int, int, int]] = []
    keys: list[str] = []
    labels: dict[str, int] = {}
    with _HeaderFile(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in _regular_files(archive, path.stat().st_size):
            key, suffix = _key_and_suffix(member.name)
            if suffix in _CLASS_SUFFIXES:
                with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    labels[key] = _read_label(archive, member, suffix)
            else:
                names.append(prefix + member.name)
                extents.append((number, member.offset_data, member.size))
                keys.append(key)
    return _TarFiles(names, np.array(extents, np.int64).reshape(-1, 3), [labels.get(key, -1) for key in keys])


class _HeaderFile(io.BufferedReader):
    """A tar of which only headers and class files are read: one that declares gigabytes is refused."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, at most `size`, which must be the size of a header or of a class file."""
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _regular_files(archive: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield all members but links and devices, which hold no bytes, and sparse files, whose bytes are scattered.

    Raises:
        tarfile.ReadError: The archive, which has `size` bytes, is truncated, or a header is damaged.
    """
    position = 0
    while (member := archive.next()) is not None:
        if archive.offset <= position or member.size < 0:
            raise tarfile.ReadError(f"the size of its member {member.name!r} is negative")
        position = archive.offset
        if member.isreg() and not member.issparse():
            if member.offset_data + member.size > size:
                message = f"its member {member.name!r} has {member.size} bytes"
                raise tarfile.ReadError(f"{message}, but the archive ends after {max(0, size - member.offset_data)}")
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
    """Return the tar itself, or a decompressed copy of it, which allows random access.

    Raises:
        BadRequestError: The file is not a tar, or its content inflates as a decompression bomb does.
        FailureError: There is no room for the copy.
    """
    with path.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    if _is_header(start):  # tried first, because the name of a file in a tar may start as a compressed file does
        return path
    unpack = next((unpack for magic, unpack in _COMPRESSIONS.items() if start.startswith(magic)), None)
    if unpack is not None:
        try:
            with unpack(path) as content:
                start = content.read(tarfile.BLOCKSIZE)
                if _is_header(start):
                    blocks = chain([start], iter(partial(content.read, _BLOCK), b""))
                    return extract_copy(path, blocks, ".tar", compressed=path.stat().st_size, remedy=_BOMB_REMEDY)
        except UNREADABLE_ZIP as error:
            raise BadRequestError(f"cannot decompress {path}: {reason_of(error)}") from None
    raise BadRequestError(f"{path} is neither an image, nor a zip or tar archive, or it is damaged")


def _is_header(block: bytes) -> bool:
    """Return whether a block is the header of a member of a tar, or the end of a tar without members."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        return type(error).__name__ == "EOFHeaderError"
    return True


def _expand(pattern: str) -> list[str]:
    """Return the names that ranges of numbers stand for, with as many digits as the first number of a range has.

    Raises:
        BadRequestError: There is no name, or more than `_MAX_TARS`.
    """
    names = 1
    for first, last in _RANGE.findall(pattern):
        names *= max(0, int(last) - int(first) + 1)
    if not 0 < names <= _MAX_TARS:
        raise BadRequestError(f"{pattern} stands for {names} archives, but only 1 to {_MAX_TARS} can be read")
    return _expand_ranges(pattern)


def _expand_ranges(pattern: str) -> list[str]:
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    names = (f"{pattern[: found.start()]}{n:0{len(found[1])}}{pattern[found.end() :]}" for n in numbers)
    return [name for part in names for name in _expand_ranges(part)]


KIND = TarKind()
