"""Choices of some images of a set, which represent the whole of it."""

from __future__ import annotations

import numpy as np


def evenly_spaced(total: int, limit: int) -> list[int]:
    """Return evenly spaced indices: the first images of a sorted set would all be of one class.

    Args:
        total: Number of images; the indices are below it.
        limit: Largest number of indices.
    """
    return [round(position) for position in np.linspace(0, total - 1, min(total, limit))]
