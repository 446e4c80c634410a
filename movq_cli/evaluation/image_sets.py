"""One side of a comparison: a set of images as the figures see it, and what was met in reading it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from movq_cli.console import Console
from movq_cli.data import pixels
from movq_cli.data.images import FILTER, BadImageError, center_crop, decode, resize_short_side
from movq_cli.data.shards import DatasetManifest, SplitName
from movq_cli.errors import FailureError
from movq_cli.sources import stream
from movq_cli.sources.kinds.prepared import PreparedReader
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source


class Size(NamedTuple):
    """Of an image as it is stored, pixels."""

    width: int
    height: int


class ImageSet:
    """Images that are measured.

    Args:
        role: "real" or "fake".
        location: A folder, archive, .npz of pixels, prepared set, or a set's name.
        split: The part of a set that has splits.
        crop: Side of the central square that is looked at, pixels, the short side being resized to it; None = images as
            they are.
        limit: Of so many images, evenly spread, where there are more; None = all.
        strict: Whether a corrupt image ends the work.
        console: Corrupt images are named here.

    Raises:
        BadRequestError: There are no images.
    """

    def __init__(
        self,
        role: str,
        location: str,
        split: SplitName,
        *,
        crop: int | None = None,
        limit: int | None = None,
        strict: bool = False,
        console: Console,
    ) -> None:
        source = open_source(location).of_split(split)
        self.source: Source = source if limit is None else source.take(pixels.evenly_spaced(len(source), limit))
        self.role = role
        self.location = location
        self.split: SplitName | None = split if self.source.splits is not None else None
        self.crop = crop
        self.strict = strict
        self.sizes: dict[int, Size] = {}
        self.unreadable: dict[int, str] = {}
        self._console = console

    def __len__(self) -> int:
        return len(self.source)

    @property
    def names(self) -> tuple[str, ...]:
        """Relative paths, sorted."""
        return self.source.names

    @property
    def prepared(self) -> DatasetManifest | None:
        """How the set was prepared, where `movq prepare` made it."""
        return DatasetManifest.read(Path(self.location)) if isinstance(self.source.reader, PreparedReader) else None

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, Tensor | None]]:
        """Pixels, uint8 [3, H, W], in the order of the indices; None for a corrupt image, which is named.

        Raises:
            FailureError: An image is corrupt, and the set strict.
        """
        for index, seen in stream.mapped(self.source, indices, self._look):
            if isinstance(seen, BadImageError):
                self.leave_out(index, str(seen))
                yield index, None
            else:
                image, self.sizes[index] = seen
                yield index, image

    def leave_out(self, index: int, reason: str) -> None:
        """Count an image as corrupt, and name it.

        Raises:
            FailureError: The set is strict.
        """
        if self.strict:
            remedy = "Remove or replace it, or leave --strict out."
            raise FailureError(f"{self.role}: cannot read {self.names[index]} in {self.location}: {reason}", remedy)
        if index not in self.unreadable:
            self._console.warn(f"{self.role}: left out {self.names[index]}: {reason}")
        self.unreadable[index] = reason

    @cached_property
    def content_hash(self) -> str:
        """A SHA-256 of what the figures depend on: the images' bytes in the order of their names, and the crop.

        A prepared set's is its manifest's hash with the names; of everything else each file is read.
        """
        whole = hashlib.sha256(f"{self.crop} {FILTER if self.crop else ''}\n".encode())
        if self.source.content_hash is not None:
            whole.update("\n".join([self.source.content_hash, *self.names]).encode(errors="surrogateescape"))
            return whole.hexdigest()
        with self._console.progress(len(self), f"hashing {self.role}", "images") as progress:
            for _, digest in stream.mapped(self.source, range(len(self)), _digest):
                whole.update(b"unreadable" if isinstance(digest, BadImageError) else digest)
                progress.advance()
        return whole.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a protocol says of this side."""
        sizes = Counter(f"{size.width}x{size.height}" for size in self.sizes.values())
        prepared = self.prepared
        return {
            "source": self.location,
            "split": self.split,
            "images": len(self),
            "unreadable": [self.names[index] for index in sorted(self.unreadable)],
            "sizes": dict(sizes.most_common(5)),
            "distinct_sizes": len(sizes),
            "crop": None if self.crop is None else {"side": self.crop, "filter": FILTER},
            "prepared": prepared and prepared.model_dump(include={"hash", "filter", "size", "square", "orientation"}),
        }

    def _look(self, data: bytes) -> tuple[Tensor, Size]:
        image = decode(data)
        size = Size(*image.size)
        if self.crop is not None:
            image = center_crop(resize_short_side(image, self.crop, upscale=True), self.crop)
        return pixels.from_array(np.asarray(image)), size


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
