"""Temporary decompressed copies of compressed files, which give random access."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from movq_cli.errors import FailureError

_PREFIX = "movq-copies-"


def extract_copy(path: Path, read: Callable[[int], bytes], suffix: str) -> Path:
    """Write the decompressed content of a file into a temporary file, which is removed when this process ends.

    Args:
        path: The compressed file, for the error message.
        read: Function that returns the next decompressed bytes, at most as many as its argument says; none at the end.
        suffix: Suffix of the temporary file.

    Returns:
        The path of the temporary file.

    Raises:
        FailureError: The temporary folder has no room for it.
    """
    handle, name = tempfile.mkstemp(suffix=suffix, dir=_folder(os.getpid()))
    with os.fdopen(handle, "wb") as copy:
        while block := read(2**20):
            try:
                copy.write(block)
            except OSError as error:
                remedy = "Set TMPDIR to a folder with more space, or decompress the archive first."
                raise FailureError(f"cannot decompress {path} into {name}: {error.strerror}", remedy) from error
    return Path(name)


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
