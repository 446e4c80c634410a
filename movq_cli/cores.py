"""The processor cores that this process may use: those of its affinity and of its container, not all that exist."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""File with the limit of a container: microseconds of processor time, and the period in which they may be used."""


def allowed_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    `taskset` and batch systems restrict a process to some of the cores, and containers to a share of their time.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # There is no limit: "max", or no such file.
        quota, period = map(int, _QUOTA.read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(1, cores)
