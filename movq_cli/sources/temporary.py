"""Temporary decompressed copies of compressed files, which give random access."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from movq_cli.errors import BadRequestError, FailureError

MAX_RATIO = 100
"""Largest size of a copy, as a multiple of the compressed file's size. Photographs are compressed by half at best."""

SMALL_COPY_BYTES = 2**30
"""Size up to which a copy may be any multiple of the compressed file, bytes."""

_PREFIX = "movq-copies-"


def extract_copy(path: Path, blocks: Iterable[bytes], suffix: str, *, compressed: int, remedy: str) -> Path:
    """Write the decompressed content of a file into a temporary file, which is removed when this process ends.

    Args:
        path: The compressed file, for the error message.
        blocks: The decompressed content in blocks of at most a few megabytes.
        suffix: Suffix of the temporary file.
        compressed: Size of the compressed content, bytes.
        remedy: What to do about content that is intended in spite of its size.

    Returns:
        The path of the temporary file.

    Raises:
        BadRequestError: The content inflates to more than `MAX_RATIO` times its size.
        FailureError: The temporary folder has no room for it.
    """
    limit = max(SMALL_COPY_BYTES, MAX_RATIO * compressed)
    handle, name = tempfile.mkstemp(suffix=suffix, dir=_folder(os.getpid()))
    try:
        with os.fdopen(handle, "wb") as copy:
            for block in blocks:
                if copy.tell() + len(block) > limit:
                    message = f"{path} inflates to more than {limit} bytes from {compressed}"
                    raise BadRequestError(f"{message}, as a decompression bomb does", remedy)
                _write(copy, block, path, name)
    except BaseException:
        Path(name).unlink(missing_ok=True)  # now, because a process that goes on would occupy the space
        raise
    return Path(name)


def _write(copy: IO[bytes], block: bytes, path: Path, name: str) -> None:
    try:
        copy.write(block)
    except OSError as error:
        remedy = "Set TMPDIR to a folder with more space, or decompress the archive first."
        raise FailureError(f"cannot decompress {path} into {name}: {error.strerror}", remedy) from error


def remove_abandoned_copies() -> None:
    """Remove the copies that killed processes have left; a process locks the folder of its copies while it lives."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # It belongs to another user, or it has just been removed.
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                # The folder of a process that has just created it is not locked yet, but empty.
                if any(folder.iterdir()) and _lock(descriptor):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


@functools.cache
def _folder(_process: int) -> Path:
    """Create and lock the folder of this process's copies.

    Args:
        _process: Process id: a forked process has a folder of its own.
    """
    remove_abandoned_copies()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    _lock(os.open(folder, os.O_RDONLY))  # The descriptor, and with it the lock, stays open until this process ends.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _lock(descriptor: int) -> bool:
    """Lock an open folder, and return whether no other process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
