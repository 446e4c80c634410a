"""The Halton order of the codes of an image (Besnier et al. 2025), extended to positions with several chunks.

A masked prior draws the codes of one step independently of each other, given the visible ones. This is the less wrong,
the less these codes say about each other: they should lie far apart, and evenly between the visible codes. The points
of a Halton sequence do so at every length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from movq_cli.settings import CodeShape


def halton_points(height: int, width: int, chunks: int) -> Iterator[tuple[int, int, int]]:
    """Yield the cells of a grid in which the points of the Halton sequence with bases 2, 3 and 5 lie, without end.

    The cells are computed in integers, so that no point is rounded into the neighbor of its cell.
    """
    index = 0
    while True:
        index += 1  # Point 0 is the origin in each base; the sequence begins after it.
        row, column, chunk = (
            side * numerator // denominator
            for side, (numerator, denominator) in zip(
                (height, width, chunks), (_radical_inverse(index, base) for base in (2, 3, 5)), strict=True
            )
        )
        yield row, column, chunk


def _radical_inverse(index: int, base: int) -> tuple[int, int]:
    """Return numerator and denominator of the number in [0, 1) whose digits are those of an index in reverse order."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator, denominator


@lru_cache(maxsize=8)
def halton_ranks(shape: CodeShape) -> Tensor:
    """Return the place of each code in the Halton order, a permutation of 0 to N - 1, [N] int64 on the CPU.

    With one chunk, this is the order of Besnier et al.: the cells of the grid that the points with bases 2 (rows) and 3
    (columns) reach, each at its first point. With c chunks, the order has c rounds, and each of them visits all
    positions in that order. So a position gets its next code only after all others have as many, because the chunks of
    one position say the most about each other: h w codes lie between two of them. Which chunk a position gives in the
    first round is the third coordinate of its point, in base 5, and in each round it is the next one. So each step
    decides codes of all chunks, equally many; the index modulo c would instead give a chunk to a part of the image,
    since it also decides the row.
    """
    height, width, chunks = shape.size
    first_chunk: dict[tuple[int, int], int] = {}
    points = halton_points(height, width, chunks)
    while len(first_chunk) < shape.positions:
        row, column, chunk = next(points)
        first_chunk.setdefault((row, column), chunk)
    ranks = torch.empty(shape.size, dtype=torch.int64)
    for place, ((row, column), chunk) in enumerate(first_chunk.items()):
        for turn in range(chunks):
            ranks[row, column, (chunk + turn) % chunks] = turn * shape.positions + place
    return ranks.flatten()
