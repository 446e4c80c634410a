"""Files that are whole or absent, and reads that survive a fork: a leaf."""

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
_PERMISSION = "Choose a folder that you may write to."
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.EISDIR: "Choose another path, or remove that folder.",
    errno.ENOTDIR: "Choose another path: a folder on the way is a file.",
    errno.EEXIST: "Choose another path: a folder on the way is a file.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


@contextmanager
def atomic_path(path: Path, *, contested: bool = False) -> Iterator[Path]:
    """Write a file aside and move it into place when the block ends well.

    Whoever looks at `path` sees the old file or the whole new one, after a crash or a power cut too.
    The neighbour's name is fixed, so what a killed run left behind is overwritten, not collected.

    Args:
        path: The file to make; its parent folders are created.
        contested: Several processes may be at it at once. Each then writes aside under a name of its own, and what a
            killed one left behind stays until its folder is removed.

    Yields:
        The neighbour `<path>.partial`, which the block must write and close.

    Raises:
        FailureError: The disk is full, the path cannot be written, or the block raised an `OSError`.
    """
    own = f".{uuid.uuid4().hex}" if contested else ""
    partial = path.with_name(f"{path.name}{own}.partial")
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
        # Gone after a good end; where even removing fails, the first error is the one to tell.
        with suppress(OSError):
            partial.unlink()


def atomic_write(path: Path, data: bytes, *, contested: bool = False) -> None:
    """Write a whole file or none.

    Args:
        path: The file to make or replace; its parent folders are created.
        data: Its content.
        contested: As for `atomic_path`.

    Raises:
        FailureError: It could not be written; an existing file is then unchanged.
    """
    with atomic_path(path, contested=contested) as partial:
        partial.write_bytes(data)


def write_once(path: Path, data: bytes) -> None:
    """Write a whole file unless there is one: of several processes at it at once, the first one's stays.

    Raises:
        FailureError: It could not be written.
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
    """A folder, made where it is missing, for this process alone.

    Args:
        folder: The folder.
        command: Who claims it, for the message to whoever comes second.
        shared: Others who say so too may be at work in it.

    Raises:
        BadRequestError: It is a file, or another process is at work in it.
        FailureError: It cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise BadRequestError(f"{folder} is a file", "Name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise FailureError(f"cannot make {folder}: {error.strerror}", _PERMISSION) from None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BadRequestError(f"another {command} is at work in {folder}", "Wait until it has ended.") from None
    except OSError:
        pass  # some network file systems have no locks
    # A worker that outlives a killed parent for a moment must not hold its claim.
    held = [descriptor]
    os.register_at_fork(after_in_child=lambda: _let_go(held))
    try:
        yield
    finally:
        _let_go(held)


def _let_go(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PositionalFiles:
    """Reads at given offsets from many files, a bounded number of them kept open.

    A forked process shares its parent's file position, and two of them seeking would read each other's
    bytes: `pread` has no position. Threads may read at once. Pickling leaves the descriptors behind; the copy opens its
    own.

    Args:
        limit: Files kept open between reads; a set of thousands of shards must not use up the process's share.
    """

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """The bytes at `offset`, fewer than `length` only where the file ends.

        Raises:
            OSError: The file cannot be opened or read.
        """
        with self._lock:
            descriptor = self._open.pop(path, None)  # while it is read from, nobody else can close it
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            self._put_back(path, descriptor)

    def _put_back(self, path: Path, descriptor: int) -> None:
        with self._lock:
            surplus = self._open.pop(path, None)  # another thread has read the same file
            if surplus is None and len(self._open) >= self.limit:
                surplus = self._open.pop(next(iter(self._open)))
            self._open[path] = descriptor  # last: the first one is the one longest unused
        if surplus is not None:
            os.close(surplus)

    def __reduce__(self) -> tuple[type[PositionalFiles], tuple[int]]:
        return PositionalFiles, (self.limit,)


def _close_all(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
