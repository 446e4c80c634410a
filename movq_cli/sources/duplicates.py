"""Which images of a source are the same file as another one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.images import BadImageError
from movq_cli.sources.source import Source

_FILES = 1000
"""Hashed at a time."""


@dataclass(frozen=True)
class Hashing:
    """The SHA-256 of every file of a source, a chunk at a time."""

    source: Source

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-len(self.source) // _FILES)

    def chunk(self, number: int) -> bytes:
        """The hashes of a chunk's files, 32 bytes each; of a file that cannot be read, bytes that no other has."""
        files = range(number * _FILES, min((number + 1) * _FILES, len(self.source)))
        return b"".join(map(self._hash, files))

    def _hash(self, index: int) -> bytes:
        try:
            return hashlib.sha256(self.source.read(index)).digest()
        except BadImageError:
            return os.urandom(32)


def later_copies(hashes: Iterable[bytes]) -> dict[int, int]:
    """Each image that is the same file as an earlier one, and the first of these.

    Args:
        hashes: In the order of the images, 32 bytes each, any number together.
    """
    rows: NDArray[np.uint64] = np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 4)
    order = np.lexsort(rows.T)  # stable: equal rows stay in the order of the images
    equal = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
    firsts: dict[int, int] = {}
    for place in np.flatnonzero(equal):
        before, later = int(order[place]), int(order[place + 1])
        firsts[later] = firsts.get(before, before)
    return firsts
