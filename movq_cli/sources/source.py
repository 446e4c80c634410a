"""The contract of every source of images, and the registry of the kinds of source.

A source is a fixed list of named images that can be read in any order, from any thread, and from any forked or
unpickled copy of the process. Nothing is ever extracted: a member of an archive is a name and some bytes, so that a
path inside an archive cannot lead outside it.

A kind of source is one file of the package `kinds`. It registers a `SourceKind`, whose `open` returns a `Source`;
`open.py` imports every file of `kinds`, so that no other file has to name a new kind.
"""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from movq_cli.data.images import BadImageError
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError

MAX_FILE_BYTES = 2**30
"""Image files above one gigabyte are refused: an image of that size exceeds the pixel limit, or is an archive bomb."""

READ_ERRORS = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""Exceptions that reading a damaged, encrypted or unsupported member of an archive raises."""


class Reader(Protocol):
    """Reads the files of a source by member number; can be forked and pickled."""

    def read(self, member: int) -> bytes:
        """Return the bytes of an encoded image.

        Raises:
            BadImageError: The member is too large or is not a file.
            OSError: The member cannot be read; so do the other exceptions in `READ_ERRORS`.
        """


@dataclass(frozen=True)
class Source:
    """Named images, readable in any order from any process.

    The constructor checks the contract, so that everything downstream may rely on it.
    """

    location: str
    """The path, pattern or set name that the user gave; for messages."""
    names: tuple[str, ...]
    """Relative POSIX paths in ascending order, unique, without `..`. This is the order of the images everywhere."""
    members: tuple[int, ...]
    """The number by which the reader knows each image."""
    reader: Reader
    """Reads the encoded files."""
    labels: tuple[int, ...] | None = None
    """For each image the index of its class in `classes`; None where the source has no classes."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty where `labels` is None."""
    splits: tuple[SplitName, ...] | None = None
    """The split of each image where the source itself defines splits, else None."""
    native_size: int | None = None
    """Side of every image in pixels, where all are squares of one size and that is known without reading them."""
    content_hash: str | None = None
    """Hash of all images, where it is known without reading them."""

    def __post_init__(self) -> None:
        """Check the contract; a violation is an error of the kind that made the source, not of the user."""
        assert all(first < second for first, second in pairwise(self.names)), "names must be ascending and unique"
        assert not any(".." in name.split("/") for name in self.names), "names must not leave their folder"
        assert len(self.members) == len(self.names), "each image needs the number of its member"
        assert self.splits is None or len(self.splits) == len(self.names), "each image needs a split"
        if self.labels is not None:
            assert len(self.labels) == len(self.names), "each image needs a label"
            assert all(0 <= label < len(self.classes) for label in self.labels), "labels are indices into classes"

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """Return the encoded file of an image.

        Args:
            index: Position of the image in `names`.

        Raises:
            BadImageError: The file cannot be read; the message is the reason.
        """
        try:
            return self.reader.read(self.members[index])
        except READ_ERRORS as error:
            if isinstance(error, BadImageError):
                raise
            reason = getattr(error, "strerror", None) or str(error)
            raise BadImageError(f"cannot be read: {reason}") from None

    def take(self, indices: Sequence[int]) -> Source:
        """Return a source that holds only some of the images.

        Args:
            indices: Positions in `names`, ascending.
        """
        return replace(
            self,
            names=tuple(self.names[index] for index in indices),
            members=tuple(self.members[index] for index in indices),
            labels=None if self.labels is None else tuple(self.labels[index] for index in indices),
            splits=None if self.splits is None else tuple(self.splits[index] for index in indices),
        )

    def of_split(self, split: SplitName) -> Source:
        """Return the images of one split, or all images where the source defines no splits.

        Raises:
            BadRequestError: The source defines splits, and this one is empty.
        """
        return self if self.splits is None else self.only_split(split)

    def only_split(self, split: SplitName) -> Source:
        """Return the images of one split.

        Raises:
            BadRequestError: The source has no image in this split, or defines no splits.
        """
        indices = [index for index, name in enumerate(self.splits or ()) if name == split]
        if not indices:
            raise BadRequestError(f"{self.location} has no {split} split")
        return self.take(indices)


@dataclass(frozen=True)
class SourceKind:
    """One kind of source: when it applies, and how it is opened."""

    matches: Callable[[str, Path], bool]
    """Whether a location is of this kind. The arguments are the location and its path, which may not exist."""
    open: Callable[[str, Path], Source]
    """Opens the location that `matches`. Exceptions in `READ_ERRORS` become one line that names the path."""
    is_fallback: bool = False
    """Fallbacks are tried after all other kinds: a folder, or a file of unknown type."""


KINDS: list[SourceKind] = []
"""All kinds of source. Of those that are no fallbacks at most one may match a location: their order has no meaning."""


def register(kind: SourceKind) -> SourceKind:
    """Add a kind of source to `KINDS`."""
    KINDS.append(kind)
    return kind


def check_bytes(size: int) -> None:
    """Refuse files that are too large to be an image.

    Args:
        size: Size of the file in bytes.

    Raises:
        BadImageError: The size is above `MAX_FILE_BYTES`.
    """
    if size > MAX_FILE_BYTES:
        raise BadImageError(f"{size} bytes is more than {MAX_FILE_BYTES}")
