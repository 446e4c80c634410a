"""What every kind of source gives: named images, readable in any order from any process."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from movq_cli.data.images import BadImageError
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError

MAX_FILE_BYTES = 2**30
"""An image file above a gigabyte is refused: no such image is below the limit of pixels, but bombs are."""


UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What reading a damaged, encrypted or exotic member of an archive raises."""


class Reader(Protocol):
    """Reads a source's files by its own count; may be forked and pickled."""

    def read(self, member: int) -> bytes:
        """The bytes of an encoded image."""


@dataclass(frozen=True)
class Source:
    """Named images, readable in any order from any process."""

    location: str  # as it was asked for
    names: tuple[str, ...]  # relative POSIX paths, sorted, unique, without `..`
    members: tuple[int, ...]  # the reader's count of each
    reader: Reader
    labels: tuple[int, ...] | None = None  # each an index into `classes`
    classes: tuple[str, ...] = ()
    splits: tuple[SplitName, ...] | None = None  # where the source itself says so
    native_size: int | None = None  # side of every image, pixels, where that is known
    content_hash: str | None = None  # a hash of all that it holds, where that is known without reading it

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The encoded file of an image.

        Raises:
            BadImageError: It cannot be read; says why.
        """
        try:
            return self.reader.read(self.members[index])
        except UNREADABLE as error:
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
        return self if self.splits is None else only_split(self, split)


def only_split(source: Source, split: SplitName) -> Source:
    indices = [index for index, name in enumerate(source.splits or ()) if name == split]
    if not indices:
        raise BadRequestError(f"{source.location} has no {split} split")
    return source.take(indices)


def check_bytes(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise BadImageError(f"{size} bytes is more than {MAX_FILE_BYTES}")
