"""The record of the machine and the date that goes with each result."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch


def machine(device: torch.device | None = None) -> dict[str, str | int]:
    """Return the processor, the versions and today's date (UTC).

    Args:
        device: Device of the benchmark; a GPU is recorded by its name.
    """
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        processor = found[1] if found else processor
    gpu = {} if device is None or device.type != "cuda" else {"gpu": torch.cuda.get_device_name(device)}
    return {
        "processor": processor,
        "cores": os.cpu_count() or 1,
        **gpu,
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": datetime.now(UTC).date().isoformat(),
    }
