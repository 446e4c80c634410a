"""Images of a source whose files are equal."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.images import BadImageError
from movq_cli.sources.source import Source

HASH_BYTES = 32
"""Length of a SHA-256, bytes."""

_CHUNK_FILES = 1000
"""Number of files that are hashed in one piece of work."""


@dataclass(frozen=True)
class Hashing:
    """The SHA-256 hashes of all files of a source, computed in chunks of some files."""

    source: Source

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-len(self.source) // _CHUNK_FILES)

    def hash_chunk(self, number: int) -> bytes:
        """Hash the files of a chunk.

        Args:
            number: Number of the chunk.

        Returns:
            The hashes, joined, `HASH_BYTES` each. A file that cannot be read gets random bytes, which equal no other.
        """
        indices = range(number * _CHUNK_FILES, min((number + 1) * _CHUNK_FILES, len(self.source)))
        return b"".join(map(self._hash, indices))

    def _hash(self, index: int) -> bytes:
        try:
            return hashlib.sha256(self.source.read(index)).digest()
        except BadImageError:
            return os.urandom(HASH_BYTES)


def find_duplicates(hashes: Iterable[bytes]) -> dict[int, int]:
    """Find the images that equal an earlier image.

    Args:
        hashes: Hashes in the order of the images, `HASH_BYTES` each, any number of them joined in each item.

    Returns:
        The index of each duplicate, with the index of the first image that it equals.
    """
    rows: NDArray[np.uint64] = np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 4)
    order = np.lexsort(rows.T)  # a stable sort: equal rows stay in the order of the images
    is_equal = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
    firsts: dict[int, int] = {}
    for position in np.flatnonzero(is_equal):
        earlier, later = int(order[position]), int(order[position + 1])
        firsts[later] = firsts.get(earlier, earlier)
    return firsts
