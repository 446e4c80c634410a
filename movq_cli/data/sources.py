"""Where images come from: a folder, an archive, a file, a prepared set, or a set known by its name.

Nothing is ever extracted: a member of an archive is a name and some bytes, wherever its path points.
"""

from __future__ import annotations

import atexit
import io
import lzma
import math
import os
import re
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from movq_cli.data import tars
from movq_cli.data.images import IMAGE_SUFFIXES, BadImageError, encode_png
from movq_cli.data.named_sets import SETS, load_named_set
from movq_cli.data.shards import PLAN, SPLITS, PreparedSet, Split, SplitName, shard_path
from movq_cli.errors import BadRequestError, FailureError, did_you_mean
from movq_cli.files import PositionalFiles

MAX_FILE_BYTES = 2**30
"""An image file above a gigabyte is refused: no such image is below the limit of pixels, but bombs are."""

_TRAIN = "train"
_HELD_OUT = frozenset(["val", "valid", "validation", "test"])

_ARRAY, _LABELS = "arr_0.npy", "arr_1.npy"
"""What numpy names the arrays in an .npz file that were given no names."""

_LARGE_HEADER = np.lib.format.read_array_header_2_0
_LENGTHS_AT = 26
"""In the header of a zip's member: the lengths of its name and of what follows the name, two bytes each."""

_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What reading a damaged, encrypted or exotic member of an archive raises."""


class Reader(Protocol):
    """Reads a source's files by its own count; may be forked and pickled."""

    def read(self, member: int) -> bytes:
        """The bytes of an encoded image."""


@dataclass(frozen=True)
class Source:
    """Named images, readable in any order from any process."""

    spec: str  # as it was asked for
    names: tuple[str, ...]  # relative POSIX paths, sorted, unique, without `..`
    members: tuple[int, ...]  # the reader's count of each
    reader: Reader
    labels: tuple[int, ...] | None = None  # each an index into `classes`
    classes: tuple[str, ...] = ()
    splits: tuple[SplitName, ...] | None = None  # where the source itself says so
    native_size: int | None = None  # side of every image, pixels, where that is known
    content: str | None = None  # a hash of all that it holds, where that is known without reading it

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The encoded file of an image.

        Raises:
            BadImageError: It cannot be read; says why.
        """
        try:
            return self.reader.read(self.members[index])
        except _UNREADABLE as error:
            if isinstance(error, BadImageError):
                raise
            reason = getattr(error, "strerror", None) or str(error)
            raise BadImageError(f"cannot be read: {reason}") from None

    def take(self, indices: Sequence[int]) -> Source:
        """The same source with these images only."""
        return replace(
            self,
            names=tuple(self.names[index] for index in indices),
            members=tuple(self.members[index] for index in indices),
            labels=None if self.labels is None else tuple(self.labels[index] for index in indices),
            splits=None if self.splits is None else tuple(self.splits[index] for index in indices),
        )

    def of_split(self, split: SplitName) -> Source:
        """A split's images; all of them where the source has no splits.

        Raises:
            BadRequestError: It has splits, and this one is empty.
        """
        return self if self.splits is None else _only(self, split)


def open_source(spec: str, split: SplitName | None = None) -> Source:
    """List the images of a source.

    Args:
        spec: The path of a folder, a zip, a tar (compressed or not), a folder of tars, an .npz of pixels, a .txt list
            of images, an image or a prepared set; or tars with a range of numbers, `train-{0000..0009}.tar`; or a name
            from `SETS`. A path that exists wins over a name.
        split: Only this split, of a source that has splits.

    Returns:
        The source; in folders and archives, labels come from class folders and splits from `train` and `val`.

    Raises:
        BadRequestError: Neither a path nor a name, no image inside, unreadable, or no such split.
        FailureError: A set could not be downloaded, or an archive not unpacked.
    """
    path = Path(spec)
    with _listing(path):
        exists = spec != "" and path.exists()
    if exists:
        source = _open_path(spec, path)
    elif spec in SETS:
        source = _open_named(spec)
    elif tars.is_pattern(spec):
        with _listing(path):
            source = _open_tars(spec, [Path(name) for name in tars.expanded(spec)])
    else:
        raise BadRequestError(f"no file or folder at {spec!r}, nor a set of that name", did_you_mean(spec, SETS))
    return source if split is None else _only(source, split)


def _open_path(spec: str, path: Path) -> Source:
    with _listing(path):
        if path.is_dir():
            return _open_folder(spec, path)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return Source(spec, (path.name,), (0,), FolderReader(path.parent, (path.name,)))
        if path.suffix.lower() == ".txt":
            return _open_list(spec, path)
        return _open_zip(spec, path) if zipfile.is_zipfile(path) else _open_tars(spec, [path])


def _open_folder(spec: str, path: Path) -> Source:
    # Not by the manifest: a folder of samples has one of its own.
    if (path / PLAN).is_file() or shard_path(path, "train", 0).is_file():
        return _open_prepared(spec, path)
    found = list(_walk(path, "", frozenset()))
    shards = tars.alone(found)
    if shards and not any(map(_is_image, found)):
        return _open_tars(spec, [path / name for name in shards])
    return _assemble(spec, found, FolderReader(path, tuple(found)))


def _open_zip(spec: str, path: Path) -> Source:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if any(info.filename == _ARRAY for info in infos):
            return _open_arrays(spec, path, archive)
    # Some packers write backslashes, against the format.
    found = ["" if info.is_dir() else info.filename.replace("\\", "/") for info in infos]
    return _assemble(spec, found, ZipReader(path))


@contextmanager
def _listing(path: Path) -> Iterator[None]:
    try:
        yield
    except (*_UNREADABLE, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadRequestError(f"cannot read {getattr(error, 'filename', None) or path}: {reason}") from error


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Files below a folder, through links as with `find -L`: those to a folder above are not followed."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            linked = entry.is_symlink() and Path(entry.path).is_dir()
            if linked or entry.is_dir(follow_symlinks=False):
                if _visible(entry.name):
                    yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {identity})
            else:
                yield prefix + entry.name


def _visible(part: str) -> bool:
    return not part.startswith(".") and part != "__MACOSX"


def _open_list(spec: str, path: Path) -> Source:
    """Images by their paths, one a line, from the list's folder on; after a tab perhaps a class."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    rows = [line.partition("\t") for line in lines if line.strip()]
    files = tuple(file for file, _, _ in rows)
    if not any((path.parent / file).exists() for file in files):
        remedy = "A list has one path a line, absolute or from the list's folder on, and after a tab perhaps a class."
        raise BadRequestError(f"none of the {len(files)} images that {path} lists is there", remedy)
    source = _assemble(spec, files, FolderReader(path.parent, files), listed=True)
    given = [rows[member][2].strip() for member in source.members]
    if not all(given):
        return source
    numbers = {name: number for number, name in enumerate(sorted(set(given)))}
    return replace(source, labels=tuple(numbers[name] for name in given), classes=tuple(numbers))


def _open_tars(spec: str, paths: Sequence[Path]) -> Source:
    for path in paths:
        if not tarfile.is_tarfile(path):
            raise BadRequestError(f"{path} is neither an image, nor a zip or tar archive, or it is damaged")
    plain = [_uncompressed(path) for path in paths]
    several = len(paths) > 1
    # Several may hold files of the same names.
    files = tars.list_files(plain, [f"{path.stem}/" if several else "" for path in paths])
    source = _assemble(spec, files.names, TarReader(tuple(plain), files.extents))
    if several:
        kinds = [_split_of(path) for path in paths]
        splits = [kinds[number] for number in files.extents[list(source.members), 0]]
        known = tuple(split for split in splits if split is not None)
        both = len(known) == len(splits) and len(set(known)) == len(SPLITS)
        source = replace(source, labels=None, classes=(), splits=known if both else None)
    labels = tuple(files.labels[member] for member in source.members)
    if min(labels) < 0:
        return source
    return replace(source, labels=labels, classes=tuple(map(str, range(max(labels) + 1))))


def _split_of(path: Path) -> SplitName | None:
    """What a tar's name says, such as `imagenet1k-validation-03.tar`."""
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    return "train" if _TRAIN in words else "val" if words & _HELD_OUT else None


def _uncompressed(path: Path) -> Path:
    """The tar itself, or for random access a decompressed copy that lives as long as this process."""
    try:
        with tarfile.open(path, "r:"):
            return path
    except tarfile.ReadError:
        pass
    with tarfile.open(path, "r:*") as archive:
        assert archive.fileobj is not None
        archive.fileobj.seek(0)
        return _copied(path, archive.fileobj.read, ".tar")


def _copied(path: Path, read: Callable[[int], bytes], suffix: str) -> Path:
    """A copy of what an archive holds, that lives as long as this process."""
    handle, name = tempfile.mkstemp(prefix="movq-", suffix=suffix)
    atexit.register(Path(name).unlink, missing_ok=True)
    with os.fdopen(handle, "wb") as copy:
        while block := read(2**20):
            try:
                copy.write(block)
            except OSError as error:
                remedy = "Set TMPDIR to a folder with more space, or decompress the archive first."
                raise FailureError(f"cannot decompress {path} into {name}: {error.strerror}", remedy) from error
    return Path(name)


def npz_arrays(path: Path) -> set[str]:
    """The names of the arrays in an .npz file; empty where it is none."""
    if not zipfile.is_zipfile(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _open_arrays(spec: str, path: Path, archive: zipfile.ZipFile) -> Source:
    """An .npz file of images, as guided-diffusion's evaluator reads them: pixels in `arr_0`, classes in `arr_1`."""
    info = archive.getinfo(_ARRAY)
    with archive.open(info) as member:
        shape = _pixel_shape(path, member)
        start = member.tell()
    if info.compress_type == zipfile.ZIP_STORED:
        file, start = path, start + _member_offset(path, info)
    else:
        with archive.open(info) as member:
            file = _copied(path, member.read, ".npy")
    labels = _array_labels(archive, shape[0])
    return Source(
        spec=spec,
        names=tuple(f"{index:06d}.png" for index in range(shape[0])),
        members=tuple(range(shape[0])),
        reader=PixelReader(file, start, shape[1:]),
        labels=labels,
        classes=() if labels is None else tuple(map(str, range(max(labels) + 1))),
        native_size=shape[1] if shape[1] == shape[2] else None,
    )


def _pixel_shape(path: Path, member: IO[bytes]) -> tuple[int, ...]:
    """N, H, W, 3 of an array of images, which must be of bytes."""
    read = np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(member) == (1, 0) else _LARGE_HEADER
    shape, by_columns, dtype = read(member)
    if by_columns or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise BadRequestError(f"{path} holds {dtype} {list(shape)} as arr_0, not images: uint8 [N, H, W, 3]")
    return tuple(shape)


def _member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin, which only the header before them tells."""
    with path.open("rb") as file:
        file.seek(info.header_offset + _LENGTHS_AT)
        return file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))


def _array_labels(archive: zipfile.ZipFile, images: int) -> tuple[int, ...] | None:
    if _LABELS not in archive.namelist():
        return None
    with archive.open(_LABELS) as member:
        labels = np.lib.format.read_array(member)
    usable = labels.shape == (images,) and np.issubdtype(labels.dtype, np.integer) and labels.min() >= 0
    return tuple(labels.tolist()) if usable else None


def _open_prepared(spec: str, path: Path) -> Source:
    prepared = PreparedSet.open(path)
    splits = [prepared.split(name) for name in SPLITS]
    places = [(name, index) for name, split in zip(SPLITS, splits, strict=True) for index in range(len(split))]
    manifest = prepared.manifest
    labels = [label for split in splits if split.labels is not None for label in split.labels.tolist()]
    return Source(
        spec=spec,
        names=tuple(f"{name}/{splits[SPLITS.index(name)].name(index)}" for name, index in places),
        members=tuple(range(len(places))),
        reader=PreparedReader(tuple(splits)),
        labels=tuple(labels) if manifest.classes else None,
        classes=manifest.classes,
        splits=tuple(name for name, _ in places),
        content=manifest.hash,
        native_size=manifest.min_side if manifest.min_side == manifest.max_side else None,
    )


def _open_named(spec: str) -> Source:
    found = load_named_set(spec)
    return Source(
        spec=spec,
        names=found.names,
        members=tuple(range(len(found.names))),
        reader=found.reader,
        labels=found.labels,
        classes=found.classes,
        splits=found.splits,
        native_size=found.native_size,
    )


def _only(source: Source, split: SplitName) -> Source:
    indices = [index for index, name in enumerate(source.splits or ()) if name == split]
    if not indices:
        raise BadRequestError(f"{source.spec} has no {split} split")
    return source.take(indices)


def _assemble(spec: str, found: Sequence[str], reader: Reader, *, listed: bool = False) -> Source:
    """A source from the names that a folder or an archive holds, the member's number being its place.

    Args:
        spec: As it was asked for.
        found: The names.
        reader: Of the files.
        listed: The user has named each of them: none is left out for its name.
    """
    members: dict[str, int] = {}
    latest = {name: member for member, name in enumerate(found)}  # a name stored twice: the later one counts
    for name, member in sorted(latest.items()):
        clean = _clean(name)
        if listed or (_is_image(clean) and all(map(_visible, clean.split("/")))):
            members[_distinct(clean, members)] = member
    if not members:
        raise BadRequestError(f"no image in {spec}", f"Looked for: {' '.join(sorted(IMAGE_SUFFIXES))}.")
    names = tuple(sorted(members))
    splits, labels, classes = _labels(names)
    return Source(spec, names, tuple(members[name] for name in names), reader, labels, classes, splits)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _clean(name: str) -> str:
    """The name as a relative path: outputs are named after their images, and must not leave their folder."""
    return "/".join(part for part in name.split("/") if part not in {"", ".", ".."})


def _distinct(name: str, taken: dict[str, int]) -> str:
    path, count = PurePosixPath(name), 1
    while name in taken:
        count += 1
        name = str(path.with_stem(f"{path.stem}~{count}"))
    return name


def _labels(
    names: Sequence[str],
) -> tuple[tuple[SplitName, ...] | None, tuple[int, ...] | None, tuple[str, ...]]:
    """Splits, labels and classes from folders: `[common/...][train|val/][class/...]image`."""
    parts = [name.split("/")[:-1] for name in names]
    depth = 0
    while len(tops := _level(parts, depth)) == 1 and None not in tops:
        depth += 1
    splits: tuple[SplitName, ...] | None = None
    if _TRAIN in tops and len(tops) > 1 and tops <= {_TRAIN, *_HELD_OUT}:
        splits = tuple("train" if folders[depth] == _TRAIN else "val" for folders in parts)
        depth += 1
    classes = _level(parts, depth)
    if None in classes or len(classes) < 2:
        return splits, None, ()
    numbers = {name: number for number, name in enumerate(sorted(map(str, classes)))}
    return splits, tuple(numbers[folders[depth]] for folders in parts), tuple(numbers)


def _level(parts: Sequence[Sequence[str]], depth: int) -> set[str | None]:
    """The folders at a depth; None for images that lie above it."""
    return {folders[depth] if depth < len(folders) else None for folders in parts}


def _check_bytes(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise BadImageError(f"{size} bytes is more than {MAX_FILE_BYTES}")


@dataclass(frozen=True)
class FolderReader:
    """Files below a folder."""

    root: Path
    files: tuple[str, ...]

    def read(self, member: int) -> bytes:
        """The file's bytes."""
        path = self.root / self.files[member]
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a file")  # from a pipe one would read for ever
        _check_bytes(status.st_size)
        return path.read_bytes()


@dataclass(frozen=True, eq=False)
class TarReader:
    """Members of uncompressed tars, by place."""

    paths: tuple[Path, ...]
    extents: NDArray[np.int64]  # [N, 3]: which tar, offset, length, bytes
    files: PositionalFiles = field(default_factory=PositionalFiles)

    def read(self, member: int) -> bytes:
        """The member's bytes."""
        number, offset, length = self.extents[member].tolist()
        _check_bytes(length)
        return self.files.read(self.paths[number], offset, length)


@dataclass(frozen=True)
class PixelReader:
    """Images that lie one after the other in a file, pixel by pixel."""

    path: Path
    start: int  # of the first image, bytes
    shape: tuple[int, ...]  # H, W, 3
    files: PositionalFiles = field(default_factory=PositionalFiles)

    def read(self, member: int) -> bytes:
        """The image as a PNG."""
        length = math.prod(self.shape)
        _check_bytes(length)
        data = self.files.read(self.path, self.start + member * length, length)
        if len(data) < length:
            raise BadImageError("truncated")
        return encode_png(Image.fromarray(np.frombuffer(data, dtype=np.uint8).reshape(self.shape)), compress_level=0)


@dataclass(frozen=True)
class ZipReader:
    """Members of a zip, whatever their compression, in the order of its directory."""

    path: Path

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(io.BufferedReader(_ForkSafe(self.path)))

    def read(self, member: int) -> bytes:
        """The member's bytes, their checksum verified."""
        info = self._archive.infolist()[member]
        _check_bytes(info.file_size)
        return self._archive.read(info)

    def __reduce__(self) -> tuple[type[ZipReader], tuple[Path]]:
        return ZipReader, (self.path,)


class _ForkSafe(io.RawIOBase):
    """A file whose position lives in this process: a forked child that seeks does not move its parent."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._position = 0

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {
            os.SEEK_SET: 0,
            os.SEEK_CUR: self._position,
            os.SEEK_END: os.fstat(self._file.fileno()).st_size,
        }
        self._position = start[whence] + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = os.preadv(self._file.fileno(), [buffer], self._position)
        self._position += count
        return count


@dataclass(frozen=True)
class PreparedReader:
    """A prepared set's splits, one after the other."""

    splits: tuple[Split, ...]

    def read(self, member: int) -> bytes:
        """The image's PNG."""
        for split in self.splits:
            if member < len(split):
                return split.read(member)
            member -= len(split)
        raise IndexError(member)
