"""Entropies of codes, and the mutual information of codes that lie beside each other, in nats.

Shapes: N images, h w code grid, c chunks, n pairs of symbols.

Few images bias both. The plain estimate of an entropy from n symbols is too small by about (m - 1) / 2n, where m is the
number of different symbols; it is corrected by that amount (Miller 1955). The plain estimate of a mutual information is
too large: independent symbols have more than 0. It is adjusted for chance (Vinh et al. 2010), which gives 0 on average
for independent symbols, and the entropy for equal ones, for any n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.integer]

_SHUFFLES = 3
"""Number of random pairings whose mutual information is averaged. It varies little between pairings: with K symbols by
about the square root of 2 over K of itself."""


@dataclass(frozen=True)
class MutualInformation:
    """The mutual information of pairs of symbols, in nats."""

    adjusted: float
    """Value adjusted for chance: 0 on average for independent symbols, the smaller entropy for equal ones."""
    plain: float
    """Value of the observed frequencies."""
    by_chance: float
    """Value of the same symbols in random pairs, which is the bias of few images; near `limit`, nothing is known."""
    limit: float
    """The smaller of both entropies, which is the largest possible value."""


def entropy(symbols: Symbols, *, corrected: bool = True) -> float:
    """Return the entropy of the frequencies of symbols [...], in nats.

    Args:
        symbols: Non-negative integers; at least one.
        corrected: Whether the bias of few symbols is corrected.
    """
    counts = np.unique(symbols, return_counts=True)[1]
    return entropy_of_counts(counts) + ((len(counts) - 1) / (2 * counts.sum()) if corrected else 0.0)


def entropy_of_counts(counts: Symbols, frequencies: NDArray[np.float64] | None = None) -> float:
    """Return the entropy of symbols by their counts, in nats; with other frequencies, the cross entropy.

    Args:
        counts: Number of times that each symbol occurs, [m]; at least one is not 0.
        frequencies: Expected share of each symbol, [m] or more, positive; None takes the shares of the counts.
    """
    used = counts > 0
    share = counts / counts.sum()
    expected = share if frequencies is None else frequencies[: len(share)]
    return float(-(share[used] * np.log(expected[used])).sum())


def entropy_of_positions(codes: Symbols) -> NDArray[np.float64]:
    """Return the entropy over the images of the code at each position and chunk, [h, w, c], in nats, corrected.

    Args:
        codes: Codes [N, h, w, c].
    """
    flat = codes.reshape(len(codes), -1)
    return np.array([entropy(column) for column in flat.T]).reshape(codes.shape[1:])


def mutual_information(first: Symbols, second: Symbols, seed: int = 0) -> MutualInformation:
    """Return the mutual information of pairs of symbols, with its adjustment for chance.

    Args:
        first: First symbol of each pair, [n] non-negative integers; at least one.
        second: Second symbol of each pair, [n].
        seed: Seed of the random pairs that tell what chance gives.
    """
    base = int(second.max()) + 1
    left, right = first.astype(np.int64) * base, second.astype(np.int64)
    entropies = entropy(first, corrected=False), entropy(second, corrected=False)
    generator = np.random.default_rng(seed)

    def of_pairs(others: Symbols) -> float:
        return sum(entropies) - entropy(left + others, corrected=False)

    plain = of_pairs(right)
    by_chance = float(np.mean([of_pairs(generator.permutation(right)) for _ in range(_SHUFFLES)]))
    limit = min(entropies)
    room = limit - by_chance
    adjusted = limit * (plain - by_chance) / room if room > 1e-9 else 0.0
    return MutualInformation(adjusted, plain, by_chance, limit)


def of_neighbors(codes: Symbols, axis: int) -> list[MutualInformation]:
    """Return the mutual information of neighboring codes of the same chunk, for each chunk.

    Args:
        codes: Codes [N, h, w, c].
        axis: 1 for neighbors one above the other, 2 for neighbors side by side; the grid has at least two of them.
    """
    size = codes.shape[axis]
    first, second = codes.take(range(size - 1), axis), codes.take(range(1, size), axis)
    return [mutual_information(first[..., k].ravel(), second[..., k].ravel()) for k in range(codes.shape[-1])]


def of_chunks(codes: Symbols) -> dict[tuple[int, int], MutualInformation]:
    """Return the mutual information of the codes of two chunks of a position, for each pair of chunks.

    Args:
        codes: Codes [N, h, w, c].
    """
    columns = codes.reshape(-1, codes.shape[-1]).T
    return {
        (first, second): mutual_information(columns[first], columns[second])
        for first in range(len(columns))
        for second in range(first + 1, len(columns))
    }


def of_positions(codes: Symbols) -> list[MutualInformation]:
    """Return the mutual information of a code and its position in the grid, for each chunk.

    Args:
        codes: Codes [N, h, w, c].
    """
    images, height, width, chunks = codes.shape
    positions = np.tile(np.arange(height * width), images)
    return [mutual_information(codes[..., chunk].ravel(), positions) for chunk in range(chunks)]
