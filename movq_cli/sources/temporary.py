"""Decompressed copies of archives, for random access."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from movq_cli.errors import FailureError


def copied(path: Path, read: Callable[[int], bytes], suffix: str) -> Path:
    """A copy of what an archive holds, that lives as long as this process."""
    handle, name = tempfile.mkstemp(prefix="movq-", suffix=suffix)
    atexit.register(Path(name).unlink, missing_ok=True)
    with os.fdopen(handle, "wb") as copy:
        while block := read(2**20):
            try:
                copy.write(block)
            except OSError as error:
                remedy = "Set TMPDIR to a folder with more space, or decompress the archive first."
                raise FailureError(f"cannot decompress {path} into {name}: {error.strerror}", remedy) from error
    return Path(name)
