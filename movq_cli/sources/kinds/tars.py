"""Tar archives: plain ones, and shards of WebDataset, in which the files of one key belong together."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.array_files import UNREADABLE_ZIP, reason_of
from movq_cli.data.shard_index import INDEX
from movq_cli.errors import BadRequestError
from movq_cli.files import PositionalFiles
from movq_cli.sources.archives import name_unused_titles, places_of, titles_of
from movq_cli.sources.arrays import ARRAY_REMEDY
from movq_cli.sources.labels import CHOICE, assemble, is_image, plugin_remedy, unlabelled_warning
from movq_cli.sources.numbering import number_values
from movq_cli.sources.source import Source, SourceKind, check_bytes, stamp_of_file
from movq_cli.sources.temporary import extract_copy
from movq_cli.text_encoding import decode_text

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

_NPY_MAGIC = b"\x93NUMPY"
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
        folders in the tars; splits come from the paths of several tars, or from the folders in them. Of the images of
        a WebDataset key, the first is listed, or the one without a further suffix (`0.jpg` and not `0.seg.png`).

    Raises:
        BadRequestError: A file is not a tar, or there is no image.
        FailureError: There is no room for a decompressed copy.
    """
    uncompressed = [_uncompressed(path) for path in paths]
    titles = titles_of(paths)
    are_several = len(paths) > 1
    files = _list_files(uncompressed, paths, [f"{title}/" if are_several else "" for title in titles])
    reader = TarReader(tuple(uncompressed), files.extents, tuple(paths))
    places = places_of(files.names, titles, files.extents[:, 0].tolist()) if are_several else None
    source = assemble(location, files.names, reader, places=places)
    if files.extras:
        warning = (
            f"{len(files.extras)} images were left out, such as {files.extras[0]}: WebDataset's key before the first "
            "dot is that of another image, which is used"
        )
        source = replace(source, warnings=(*source.warnings, warning))
    source = _with_labels(source, [files.labels[member] for member in source.members], files.has_class_files)
    return name_unused_titles(source, titles)


def _with_labels(source: Source, values: Sequence[int | str | None], has_class_files: bool) -> Source:
    """Return the source with the values of its class files as labels, or with a warning why they are not used.

    Args:
        source: The source.
        values: Value of each image in its class file; None = it has no file with a usable value.
        has_class_files: Whether there is a class file at all.
    """
    if not has_class_files:
        return source
    if None in values:
        warning = unlabelled_warning(source.names, values, f"Complete the .cls or .json files. {CHOICE}")
        # The folders in the tars may give each image a class.
        return source if source.labels is not None else replace(source, label_warnings=(warning,))
    largest = max((value for value in values if isinstance(value, int)), default=-1)
    name = source.names[values.index(largest)] if largest >= 0 else ""
    labels = number_values(f"the class file of {name} in {source.location}", values)
    if labels is not None:
        return replace(source, labels=labels[0], classes=labels[1], label_warnings=())
    if len(set(values)) == 1:
        return source  # A class of all images says nothing.
    warning = "the .cls and .json files hold both numbers and names, or negative numbers, so that no image has a class"
    return replace(source, label_warnings=(f"{warning}. Correct them, or pass --no-labels",))


@dataclass(frozen=True, eq=False)
class TarReader:
    """The files in uncompressed tars, read by their offsets."""

    paths: tuple[Path, ...]
    extents: NDArray[np.int64]  # [N, 3]: index of the tar, offset in it, length; the last two in bytes
    origins: tuple[Path, ...]  # the tars as the user knows them, which may be compressed
    files: PositionalFiles = field(default_factory=PositionalFiles)

    def read(self, member: int) -> bytes:
        """Return the bytes of a file."""
        tar, offset, length = self.extents[member].tolist()
        check_bytes(length)
        return self.files.read(self.paths[tar], offset, length)

    def stamp(self, member: int) -> tuple[int, int]:
        """Return the size of a file, and the time of change of its tar."""
        tar, _, length = self.extents[member].tolist()
        return length, stamp_of_file(self.origins[tar])[1]


class _TarFiles(NamedTuple):
    """The files in several tars, in the order of the tars."""

    names: list[str]
    extents: NDArray[np.int64]  # as for `TarReader`
    labels: list[int | str | None]  # number or name in the class file of the same key; None = there is none
    extras: list[str]  # names of images that are left out, because their key has another image
    has_class_files: bool  # whether there is a class file, usable or not


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
    names, extents, labels, extras, has_class_files = zip(*lists, strict=True)
    joined = list(chain(*names)), np.concatenate(extents), list(chain(*labels)), list(chain(*extras))
    return _TarFiles(*joined, any(has_class_files))


def _list_tar(path: Path, number: int, prefix: str) -> _TarFiles:
    """List the regular files in an uncompressed tar, which has a number among several and a prefix for its names."""
    members: dict[str, tuple[int, int, int]] = {}  # of equal names, the last counts
    values: dict[str, int | str | None] = {}
    keys: set[str] = set()  # of the files that are no images
    with _HeaderFile(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in _regular_files(archive, path.stat().st_size):
            key, _, suffix = _split_name(member.name)
            if suffix in _CLASS_SUFFIXES and PurePosixPath(member.name).name != INDEX:
                has_value, value = _read_value(archive, member, suffix)
                if has_value:
                    values[key] = value
                    keys.add(key)
                    continue
            if not is_image(member.name):
                keys.add(key)
            members[member.name] = (number, member.offset_data, member.size)
    extras = _extras(members, keys)
    names = [name for name in members if name not in extras]
    extents = np.array([members[name] for name in names], np.int64).reshape(-1, 3)
    labels = [_value_of(name, values) for name in names]
    return _TarFiles(
        [prefix + name for name in names], extents, labels, [prefix + name for name in extras], bool(values)
    )


def _extras(names: Iterable[str], keys: Collection[str]) -> dict[str, None]:
    """Return the images that do not count, because their WebDataset key has another image.

    Args:
        names: Names of all files, in order.
        keys: Keys of the files that are no images: an image without such a file beside it is not WebDataset's.
    """
    images: dict[str, list[str]] = {}
    for name in filter(is_image, names):
        full, short, _ = _split_name(name)
        key = full if full in keys else short
        if key in keys:
            images.setdefault(key, []).append(name)
    # A name without a further suffix comes first: `0.jpg` is the image, and `0.depth.png` belongs to it.
    ordered = (sorted(group, key=lambda name: _split_name(name)[0] != key) for key, group in images.items())
    return dict.fromkeys(chain.from_iterable(group[1:] for group in ordered))


def _value_of(name: str, values: Mapping[str, int | str | None]) -> int | str | None:
    full, short, _ = _split_name(name)
    return values[full] if full in values else values.get(short)


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


def _split_name(name: str) -> tuple[str, str, str]:
    """Return a name without its suffix, the same up to the first dot, and the suffix in lower case.

    WebDataset's key ends at the first dot, as in `0.seg.png`, but some names have a dot of their own, as `v1.0.jpg`.
    """
    folder, _, file = name.rpartition("/")
    stem, dot, suffix = file.rpartition(".")
    full = stem if dot else file
    return f"{folder}/{full}", f"{folder}/{file.partition('.')[0]}", suffix.lower() if dot else ""


def _read_value(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> tuple[bool, int | str | None]:
    """Return whether a file is one with a class, and the class: a number from 0 on or a name; None = unusable."""
    file = archive.extractfile(member)
    assert file is not None
    data = file.read(_MAX_CLASS_BYTES)
    try:
        value = json.loads(data) if suffix == "json" else decode_text(data).strip()
    except (ValueError, RecursionError):
        return suffix == "cls", None
    if suffix == "json":
        if not isinstance(value, dict) or "label" not in value:
            return False, None
        value = value["label"]
    try:
        number = int(value)
    except (ValueError, TypeError, OverflowError):
        return True, value if isinstance(value, str) and value != "" else None
    return True, number if number >= 0 else None


def begins_as_tar(path: Path) -> bool:
    """Return whether a file begins as a tar or a compressed file does."""
    with path.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    return _is_header(start) or start.startswith(tuple(_COMPRESSIONS))


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
    if start.startswith(_NPY_MAGIC):
        raise BadRequestError(f"{path} is an array alone, which is not read as images", ARRAY_REMEDY)
    raise BadRequestError(
        f"{path} is neither an image, nor a zip or tar archive, or it is damaged{plugin_remedy([path.suffix.lower()])}"
    )


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
