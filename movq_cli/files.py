"""Atomic writes, folder locks, hashes, and reads that are safe in forked processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from movq_cli.errors import BadRequestError, FailureError

_SPACE = "Free some space, or choose another folder, and run the command again."
_PERMISSION = "Choose a folder to which you may write."
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.EISDIR: "Choose another path, or remove that folder.",
    errno.ENOTDIR: "Choose another path: one of its parent folders is a file.",
    errno.EEXIST: "Choose another path: one of its parent folders is a file.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


@contextmanager
def atomic_path(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Write a temporary file, and rename it to `path` when the block ends without an error.

    Every reader of `path` sees the old file or the complete new one, even after a crash or a power failure.
    The name of the temporary file is fixed, so that the next run overwrites what a killed run left behind.

    Args:
        path: File to write; its parent folders are created.
        concurrent: Whether several processes may write the file at once. Each process then uses a temporary file with a
            name of its own, and the one of a killed process stays until its folder is removed.

    Yields:
        The temporary file `<path>.partial`, which the block must write and close.

    Raises:
        FailureError: The disk is full, the path cannot be written, or the block raised an `OSError`.
    """
    unique = f".{uuid.uuid4().hex}" if concurrent else ""
    partial = path.with_name(f"{path.name}{unique}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FailureError(f"cannot write {path}: {reason}", _REMEDIES.get(error.errno or 0, "")) from error
    finally:
        # After a success it no longer exists. If even the removal fails, the first error is the one to report.
        with suppress(OSError):
            partial.unlink()


def atomic_write(path: Path, data: bytes, *, concurrent: bool = False) -> None:
    """Write a file completely or not at all.

    Args:
        path: File to create or replace; its parent folders are created.
        data: Content of the file.
        concurrent: Whether several processes may write the file at once, as for `atomic_path`.

    Raises:
        FailureError: The file could not be written; an existing file is then unchanged.
    """
    with atomic_path(path, concurrent=concurrent) as partial:
        partial.write_bytes(data)


def write_once(path: Path, data: bytes) -> None:
    """Write a file unless it exists; if several processes do so at once, the file of the first one stays.

    Raises:
        FailureError: The file could not be written.
    """
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    atomic_write(own, data)
    try:
        with suppress(FileExistsError):
            os.link(own, path)
    except OSError as error:
        raise FailureError(f"cannot write {path}: {error.strerror}", _REMEDIES.get(error.errno or 0, "")) from error
    finally:
        own.unlink()


@contextmanager
def locked(folder: Path, command: str, *, shared: bool = False) -> Iterator[None]:
    """Lock a folder for this process during the block; the folder is created if it does not exist.

    Args:
        folder: Folder to lock.
        command: Name of the command that locks it, for the error message of a second process.
        shared: Whether other processes that also pass `shared` may use the folder at the same time.

    Raises:
        BadRequestError: The path is a file, or another process has locked the folder.
        FailureError: The folder cannot be created.
    """
    if folder.exists() and not folder.is_dir():
        raise BadRequestError(f"{folder} is a file", "Name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise FailureError(f"cannot create {folder}: {error.strerror}", _PERMISSION) from None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BadRequestError(f"another {command} is at work in {folder}", "Wait until it has ended.") from None
    except OSError:
        pass  # Some network file systems have no locks.
    # A forked worker that survives its killed parent for a moment must not hold the parent's lock.
    descriptors = [descriptor]
    os.register_at_fork(after_in_child=lambda: _close_descriptors(descriptors))
    try:
        yield
    finally:
        _close_descriptors(descriptors)


def _close_descriptors(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def cache_folder() -> Path:
    """Return the folder of downloaded sets and of cached features: `movq` in $XDG_CACHE_HOME, which is ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "movq"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PositionalFiles:
    """Reads bytes at given offsets from many files, of which a limited number stay open.

    A forked process shares the file position of its parent, so two processes that seek would read each other's bytes;
    `pread` uses no position. Several threads may read at once. A pickled copy has no descriptors and opens its own.

    Args:
        limit: Number of files that stay open between reads, because a prepared set can have more shards than a process
            may have open files.
    """

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset`, or fewer at the end of the file, however large `length` is.

        Raises:
            OSError: The file cannot be opened or read.
        """
        with self._lock:
            descriptor = self._open.pop(path, None)  # While this thread reads, no other one can close it.
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
        try:
            # Python takes memory for the complete length before it reads.
            return os.pread(descriptor, max(0, min(length, os.fstat(descriptor).st_size - offset)), offset)
        finally:
            self._return(path, descriptor)

    def _return(self, path: Path, descriptor: int) -> None:
        with self._lock:
            surplus = self._open.pop(path, None)  # Another thread has read the same file.
            if surplus is None and len(self._open) >= self.limit:
                surplus = self._open.pop(next(iter(self._open)))
            self._open[path] = descriptor  # At the end: the first entry is the least recently used one.
        if surplus is not None:
            os.close(surplus)

    def __reduce__(self) -> tuple[type[PositionalFiles], tuple[int]]:
        return PositionalFiles, (self.limit,)


def _close_all(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
