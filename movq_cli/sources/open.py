"""Opens any source: chooses the kind by what is at a path."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.images import IMAGE_SUFFIXES
from movq_cli.data.shards import PLAN, SPLITS, SplitName, shard_path
from movq_cli.errors import BadRequestError, did_you_mean
from movq_cli.files import PositionalFiles
from movq_cli.sources import tars
from movq_cli.sources.archive import open_zip
from movq_cli.sources.folder import FolderReader, _walk, open_list
from movq_cli.sources.labels import assemble, is_image, split_of
from movq_cli.sources.named import SETS, load_named_set
from movq_cli.sources.prepared import open_prepared
from movq_cli.sources.source import UNREADABLE, Source, check_bytes, only_split
from movq_cli.sources.temporary import copied


def open_source(location: str, split: SplitName | None = None) -> Source:
    """List the images of a source.

    Args:
        location: The path of a folder, a zip, a tar (compressed or not), a folder of tars, an .npz of pixels, a .txt list
            of images, an image or a prepared set; or tars with a range of numbers, `train-{0000..0009}.tar`; or a name
            from `SETS`. A path that exists wins over a name.
        split: Only this split, of a source that has splits.

    Returns:
        The source; in folders and archives, labels come from class folders and splits from `train` and `val`.

    Raises:
        BadRequestError: Neither a path nor a name, no image inside, unreadable, or no such split.
        FailureError: A set could not be downloaded, or an archive not unpacked.
    """
    path = Path(location)
    with _listing(path):
        exists = location != "" and path.exists()
    if exists:
        source = _open_path(location, path)
    elif location in SETS:
        source = _open_named(location)
    elif tars.is_pattern(location):
        with _listing(path):
            source = _open_tars(location, [Path(name) for name in tars.expanded(location)])
    else:
        raise BadRequestError(
            f"no file or folder at {location!r}, nor a set of that name", did_you_mean(location, SETS)
        )
    return source if split is None else only_split(source, split)


def _open_path(location: str, path: Path) -> Source:
    with _listing(path):
        if path.is_dir():
            return _open_folder(location, path)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return Source(location, (path.name,), (0,), FolderReader(path.parent, (path.name,)))
        if path.suffix.lower() == ".txt":
            return open_list(location, path)
        return open_zip(location, path) if zipfile.is_zipfile(path) else _open_tars(location, [path])


def _open_folder(location: str, path: Path) -> Source:
    # Not by the manifest: a folder of samples has one of its own.
    if (path / PLAN).is_file() or shard_path(path, "train", 0).is_file():
        return open_prepared(location, path)
    found = list(_walk(path, "", frozenset()))
    shards = tars.alone(found)
    if shards and not any(map(is_image, found)):
        return _open_tars(location, [path / name for name in shards])
    return assemble(location, found, FolderReader(path, tuple(found)))


@contextmanager
def _listing(path: Path) -> Iterator[None]:
    try:
        yield
    except (*UNREADABLE, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadRequestError(f"cannot read {getattr(error, 'filename', None) or path}: {reason}") from error


def _open_tars(location: str, paths: Sequence[Path]) -> Source:
    for path in paths:
        if not tarfile.is_tarfile(path):
            raise BadRequestError(f"{path} is neither an image, nor a zip or tar archive, or it is damaged")
    plain = [_uncompressed(path) for path in paths]
    several = len(paths) > 1
    # Several may hold files of the same names.
    files = tars.list_files(plain, [f"{path.stem}/" if several else "" for path in paths])
    source = assemble(location, files.names, TarReader(tuple(plain), files.extents))
    if several:
        kinds = [split_of(path) for path in paths]
        splits = [kinds[number] for number in files.extents[list(source.members), 0]]
        known = tuple(split for split in splits if split is not None)
        both = len(known) == len(splits) and len(set(known)) == len(SPLITS)
        source = replace(source, labels=None, classes=(), splits=known if both else None)
    labels = tuple(files.labels[member] for member in source.members)
    if min(labels) < 0:
        return source
    return replace(source, labels=labels, classes=tuple(map(str, range(max(labels) + 1))))


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
        return copied(path, archive.fileobj.read, ".tar")


def _open_named(location: str) -> Source:
    found = load_named_set(location)
    return Source(
        location=location,
        names=found.names,
        members=tuple(range(len(found.names))),
        reader=found.reader,
        labels=found.labels,
        classes=found.classes,
        splits=found.splits,
        native_size=found.native_size,
    )


@dataclass(frozen=True, eq=False)
class TarReader:
    """Members of uncompressed tars, by place."""

    paths: tuple[Path, ...]
    extents: NDArray[np.int64]  # [N, 3]: which tar, offset, length, bytes
    files: PositionalFiles = field(default_factory=PositionalFiles)

    def read(self, member: int) -> bytes:
        """The member's bytes."""
        number, offset, length = self.extents[member].tolist()
        check_bytes(length)
        return self.files.read(self.paths[number], offset, length)
