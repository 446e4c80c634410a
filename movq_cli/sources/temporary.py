"""Decompressed copies of archives, which allow random access."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from movq_cli.errors import FailureError


def decompressed_copy(path: Path, read: Callable[[int], bytes], suffix: str) -> Path:
    """Write the content of an archive to a temporary file, which is removed when this process ends.

    Args:
        path: The archive, for messages.
        read: Returns the next bytes of the content, at most as many as asked for; empty at the end.
        suffix: Suffix of the temporary file.

    Raises:
        FailureError: The temporary file cannot be written.
    """
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
