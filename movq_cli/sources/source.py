"""The contract of a source of images: what every kind of source gives, and what its readers may rely on."""

from __future__ import annotations

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol, runtime_checkable

from movq_cli.data.array_files import UNREADABLE_ZIP, reason_of
from movq_cli.data.images import BadImageError
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError
from movq_cli.sources.temporary import MAX_RATIO

MAX_FILE_BYTES = 2**30
"""Largest size of an image file that is read. No image within the limit of pixels needs a gigabyte, but a
decompression bomb does."""

SMALL_FILE_BYTES = 2**26
"""Size up to which an image file in an archive may inflate to any multiple of its compressed size, bytes."""

UNREADABLE = (*UNREADABLE_ZIP, tarfile.TarError)
"""The exceptions that reading a missing, damaged, encrypted or exotic file or archive raises."""

_UNSAFE_PARTS = ("//", "/./", "/../")
"""Parts that a name must not have, between slashes: with them it is not relative, or not below its folder."""


class Reader(Protocol):
    """Access to the files of a source by their member numbers."""

    def read(self, member: int) -> bytes:
        """Return the bytes of an encoded image, in any format that `movq_cli.data.images.decode` knows.

        The method is called from any thread, from several threads at once, and in processes that were forked before
        or after the first call. The reader can be pickled; the copy opens its files itself.

        Args:
            member: Number of the file; the reader defines the numbering.

        Raises:
            BadImageError: This image cannot be used; the text is the reason in a few words.
            Exception: Any of `UNREADABLE`, which `Source.read` turns into a `BadImageError`.
        """


@runtime_checkable
class StampedReader(Reader, Protocol):
    """A reader that also says, without reading an image, whether its file may have changed. This is optional."""

    def stamp(self, member: int) -> tuple[int, int]:
        """Return two numbers that change with the file: its size, and its time of change or its checksum.

        Args:
            member: Number of the file. A file that does not exist has the numbers (-1, -1).
        """


@dataclass(frozen=True)
class Source:
    """A list of named images that can be read in any order.

    This is the contract of every kind of source. The constructor checks what can be checked without reading an image.

    - Order: the images are sorted by name, in the order of Python's strings (code points). The images of a split, the
      rows of a feature cache and the lines of a label file follow this order.
    - Names: a name is a relative POSIX path, unique in the source, without empty parts, `.` and `..`. Commands name
      their output files after it. Bytes that are not UTF-8 are surrogates, as from `os.fsdecode`.
    - Classes and labels: with labels, `classes` has the name of each class, and the label of an image is its index in
      `classes`. A class may have no image. Without labels, `labels` is None and `classes` is empty.
    - Splits: None if the source itself does not say which images are for training ("train") and which are held out
      ("val"); commands then use all images, or `movq prepare` draws a split.
    - Reading: `read` may be called from any thread, from several threads at once, and in forked processes. It returns
      the same bytes each time, as long as nobody changes the files.
    - Errors: opening a source raises `BadRequestError` if it cannot be used and `FailureError` if a download or the
      disk fails. A single image that cannot be read does not prevent opening: `read` then raises `BadImageError`, and
      the command decides whether it skips this image.

    Raises:
        ValueError: The names, members, labels or splits violate the contract.
    """

    location: str
    """The location as the user gave it: a path or the name of a public data set."""
    names: tuple[str, ...]
    """Names of the images, sorted and unique."""
    members: tuple[int, ...]
    """The reader's number of each image."""
    reader: Reader
    """Access to the files."""
    labels: tuple[int, ...] | None = None
    """Index of each image's class in `classes`; None = the images have no classes."""
    classes: tuple[str, ...] = ()
    """Names of the classes."""
    splits: tuple[SplitName, ...] | None = None
    """Split of each image; None = the source has no splits."""
    native_size: int | None = None
    """Side of the images, pixels, if all are squares of one size and this is known without reading them; else None."""
    content_hash: str | None = None
    """Hash that changes with any image, label or split, if it is known without reading the images; else None."""
    warnings: tuple[str, ...] = ()
    """Sentences about files that were left out, which every command shows."""
    label_warnings: tuple[str, ...] = ()
    """Sentences about classes that were not used, which a command that uses labels shows."""

    def __post_init__(self) -> None:
        violation = self._violation()
        if violation is not None:
            raise ValueError(f"the source {self.location} {violation}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_val(self) -> bool:
        """Whether the source itself says which images are held out."""
        return self.splits is not None and "val" in self.splits

    def read(self, index: int) -> bytes:
        """Return the encoded file of an image.

        Args:
            index: Index of the image in `names`.

        Raises:
            BadImageError: The file cannot be read; the text says why.
        """
        try:
            return self.reader.read(self.members[index])
        except UNREADABLE as error:
            if isinstance(error, BadImageError):
                raise
            raise BadImageError(f"cannot be read: {reason_of(error)}") from None

    def take(self, indices: Sequence[int]) -> Source:
        """Return the same source with some of its images only.

        Args:
            indices: Indices of these images, ascending.
        """
        return replace(
            self,
            names=tuple(self.names[index] for index in indices),
            members=tuple(self.members[index] for index in indices),
            labels=None if self.labels is None else tuple(self.labels[index] for index in indices),
            splits=None if self.splits is None else tuple(self.splits[index] for index in indices),
        )

    def of_split(self, split: SplitName) -> Source:
        """Return the images of a split, or all images if the source has no splits.

        Raises:
            BadRequestError: The source has splits, and this one is empty.
        """
        return self if self.splits is None else self.only_split(split)

    def only_split(self, split: SplitName) -> Source:
        """Return the images of a split.

        Raises:
            BadRequestError: The source has no such split.
        """
        indices = [index for index, name in enumerate(self.splits or ()) if name == split]
        if not indices:
            raise BadRequestError(f"{self.location} has no {split} split")
        return self.take(indices)

    def _violation(self) -> str | None:
        """Return what violates the contract, as the rest of a sentence; None if nothing does."""
        count = len(self.names)
        for name, values in {"members": self.members, "labels": self.labels, "splits": self.splits}.items():
            if values is not None and len(values) != count:
                return f"has {len(values)} {name} for {count} names"
        for name, following in pairwise(self.names):
            if name >= following:
                return f"has names that are not sorted and unique: {following!r} follows {name!r}"
        # One search in the joined names takes a twentieth of the time that a search in each name takes.
        if count and is_unsafe("/".join(self.names)):
            return f"has a name that is not a plain relative path: {next(filter(is_unsafe, self.names))!r}"
        if (self.labels is None) != (not self.classes):
            return f"has {len(self.classes)} classes and {'no' if self.labels is None else 'some'} labels"
        if self.labels and not 0 <= min(self.labels) <= max(self.labels) < len(self.classes):
            return f"has labels outside 0 to {len(self.classes) - 1}"
        return None


class SourceKind(ABC):
    """A kind of source: recognizes its locations and opens them.

    A file of `movq_cli/sources/kinds` defines a subclass and its only instance `KIND`; nothing else has to be changed
    to add a kind of source.
    """

    set_names: tuple[str, ...] = ()
    """Names of public data sets that this kind opens; they are suggested when a location is unknown."""
    is_fallback: bool = False
    """Whether all other kinds are tried first: this one takes any folder or any file."""

    @abstractmethod
    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether this kind opens a location. At most one kind that is not a fallback should match.

        Args:
            location: Location as the user gave it.
            path: Path of the file or folder at this location; None if there is none.
        """

    @abstractmethod
    def open(self, location: str, path: Path | None) -> Source:
        """List the images of a location for which `matches` is true.

        Args:
            location: Location as the user gave it, to be stored in the source.
            path: Path of the file or folder at this location; None if there is none.

        Raises:
            BadRequestError: There is no image, or the location cannot be used.
            FailureError: A download failed, or there is no room for an extracted copy.
            Exception: Any of `UNREADABLE`, which `open_source` turns into a `BadRequestError`.
        """


def is_unsafe(path: str) -> bool:
    """Return whether a name is not that of a file below a folder."""
    return any(part in f"/{path}/" for part in _UNSAFE_PARTS)


def check_bytes(size: int, compressed: int | None = None) -> None:
    """Refuse a file that is too large for an image, before it is read.

    Args:
        size: Size of the file, bytes.
        compressed: Size of the file as it is stored in an archive, bytes; None = it is not compressed.

    Raises:
        BadImageError: It is larger than `MAX_FILE_BYTES`, or inflates as no image does.
    """
    if size > MAX_FILE_BYTES:
        raise BadImageError(f"{size} bytes is more than {MAX_FILE_BYTES}")
    if compressed is not None and size > max(SMALL_FILE_BYTES, MAX_RATIO * compressed):
        raise BadImageError(f"inflates from {compressed} to {size} bytes, more than {MAX_RATIO} times its size")


def stamp_of_file(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes and its time of change in nanoseconds; (-1, -1) if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
