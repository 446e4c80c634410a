"""Atomic writes, folder locks, hashes, and reads that are safe in forked processes."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import os
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from movq_cli import folder_locks
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.paths import LONGEST_NAME

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
    errno.EBUSY: "Wait until that process has ended.",
}


@contextmanager
def atomic_file(path: Path, *, concurrent: bool = False) -> Iterator[BinaryIO]:
    """Open a new temporary file, and rename it to `path` when the block ends without an error.

    Every reader of `path` sees the old file or the complete new one, even after a crash or a power failure.
    The temporary file is created exclusively, so that a link with its name is never followed. Its name is fixed, so
    that the next run removes what a killed run left behind.

    Args:
        path: File to write; its parent folders are created.
        concurrent: Whether several processes may write the file at once. Each process then uses a temporary file with a
            name of its own, and the one of a killed process stays until its folder is removed.

    Yields:
        The temporary file `<path>.partial`, open for writing and reading.

    Raises:
        FailureError: The disk is full, the path cannot be written, or the block raised an `OSError`.
    """
    unique = f".{uuid.uuid4().hex}" if concurrent else ""
    partial = _partial(path, unique)
    with _failures(path), _temporary_file(partial) as file:
        yield file
        _sync_file(file)
        _require_same_file(partial, file)
        partial.replace(path)
        _sync(path.parent)


def atomic_write(path: Path, data: bytes, *, concurrent: bool = False) -> None:
    """Write a file completely or not at all.

    Args:
        path: File to create or replace; its parent folders are created.
        data: Content of the file.
        concurrent: Whether several processes may write the file at once, as for `atomic_file`.

    Raises:
        FailureError: The file could not be written; an existing file is then unchanged.
    """
    with atomic_file(path, concurrent=concurrent) as file:
        file.write(data)


def write_once(path: Path, data: bytes) -> None:
    """Write a file unless it exists; if several processes do so at once, the file of the first one stays.

    Raises:
        FailureError: The file could not be written.
    """
    partial = _partial(path, f".{uuid.uuid4().hex}")
    with _failures(path), _temporary_file(partial) as file:
        file.write(data)
        _sync_file(file)
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not path.exists():
                partial.replace(path)
        _sync(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, atomically; if the file system allows no such link, the file is copied.

    Args:
        source: The file. It must not be changed in place later, because both names may share its bytes.
        target: The second name, which may exist.

    Raises:
        FailureError: The target could not be written; an existing file is then unchanged.
    """
    partial = _partial(target)
    with _failures(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            os.link(source.resolve(), partial)  # Of a symbolic link, the file: a relative link is broken elsewhere.
            partial.replace(target)  # Has no effect if both are the same file already; then the next line removes it.
            partial.unlink(missing_ok=True)
            _sync(target.parent)
            return
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
    with atomic_file(target) as copy, source.open("rb") as original:
        shutil.copyfileobj(original, copy, 2**20)


_NO_LINKS = {errno.EXDEV, errno.EINVAL, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}
"""Error numbers of file systems, or pairs of them, on which a file can have one name only."""


def _partial(path: Path, unique: str = "") -> Path:
    """Return the path of the temporary file of a file, whose name may be as long as the file system allows."""
    name = f"{path.name}{unique}.partial"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f"{hashlib.sha256(os.fsencode(path.name)).hexdigest()}{unique}.partial"
    return path.with_name(name)


@contextmanager
def _temporary_file(partial: Path) -> Iterator[BinaryIO]:
    """Create a file that did not exist, with its parent folders, and remove it at the end unless it was renamed.

    What a killed run left under its name is removed first.
    """
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "w+b") as file:
            yield file
    finally:
        # If even the removal fails, the first error is the one to report.
        with suppress(OSError):
            partial.unlink()


def _sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _require_same_file(partial: Path, file: BinaryIO) -> None:
    """Raise an error if another process has replaced the temporary file, which must not be renamed then."""
    if not os.path.samestat(partial.lstat(), os.fstat(file.fileno())):
        raise OSError(errno.EBUSY, "another process is writing this file")


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into one that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FailureError(f"cannot write {path}: {reason}", _REMEDIES.get(error.errno or 0, "")) from error


@contextmanager
def locked(
    folder: Path, command: str, *, shared: bool = False, while_waiting: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Lock a folder for this process during the block; the folder is created if it does not exist.

    If the folder and its parents were created here and are still empty at the end, as after a refused request, they are
    removed.

    Args:
        folder: Folder to lock.
        command: Name of the command that locks it, for the error message of a second process.
        shared: Whether other processes that also pass `shared` may use the folder at the same time.
        while_waiting: Function that is called again and again while another process has locked the folder, with the
            name of the command and the number of that process. None = do not wait.

    Raises:
        BadRequestError: The path is a file, or another process has locked the folder and is not waited for.
        FailureError: The folder cannot be created.
    """
    if folder.exists() and not folder.is_dir():
        raise BadRequestError(f"{folder} is a file", "Name a folder.")
    # A shared folder may be in use by another process although it is still empty.
    created = [] if shared else [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        while (descriptor := folder_locks.try_lock(folder, shared=shared)) is None:
            other = f"another {command}{folder_locks.holder(folder)}"
            if while_waiting is None:
                raise BadRequestError(f"{other} is at work in {folder}", "Wait until it has ended.")
            while_waiting(other)
            time.sleep(_RETRY_SECONDS)
    except OSError as error:
        raise FailureError(f"cannot create {folder}: {error.strerror}", _PERMISSION) from None
    # A forked worker that survives its killed parent for a moment must not hold the parent's lock.
    descriptors = [descriptor]
    os.register_at_fork(after_in_child=lambda: _close_descriptors(descriptors))
    try:
        yield
    finally:
        with suppress(OSError):  # They are not empty.
            for path in created:
                path.rmdir()
        _close_descriptors(descriptors)


_RETRY_SECONDS = 0.1
"""Time between two attempts to lock a folder that another process has locked."""


@contextmanager
def new_folder(target: Path, command: str, varying: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that gets the name `target` when the block ends, and that is removed if the block fails.

    If `target` has the same files already, as after an earlier run of the same command, it stays as it is.

    Args:
        target: Folder to make.
        command: Name of the command that makes it, for the error message of a second process.
        varying: Names of files that are not compared, because each run of the command writes other times into them.

    Yields:
        The folder `<target>.partial`.

    Raises:
        BadRequestError: The folder exists with other content, or another process is making it.
        FailureError: The folder cannot be made.
    """
    partial = target.with_name(f"{target.name}.partial")
    with locked(partial, command):
        try:
            for left in partial.iterdir():  # What a killed process left behind.
                left.unlink()
            yield partial
            if not _has_files_of(partial, target, varying):
                require_new_folder(target)
                with _failures(target):
                    partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def require_new_folder(target: Path) -> None:
    """Check that a folder which a command is to make does not exist yet, or is empty.

    Raises:
        BadRequestError: The path exists, and is not an empty folder.
    """
    if is_filled(target):
        raise BadRequestError(f"{target} exists already with other content", "Name another folder, or remove this one.")


def is_filled(path: Path) -> bool:
    """Return whether a path exists and is not an empty folder."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _has_files_of(folder: Path, target: Path, varying: Collection[str]) -> bool:
    """Return whether `target` has all files of a folder, which has no folders in it, with equal content."""
    names = {path.name for path in folder.iterdir()} - {*varying}
    return target.is_dir() and filecmp.cmpfiles(folder, target, names, shallow=False)[1:] == ([], [])


def _close_descriptors(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def cache_folder() -> Path:
    """Return the folder of downloaded sets and of cached features: `movq` in $XDG_CACHE_HOME, which is ~/.cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "movq"
    except RuntimeError:  # Containers run as users who have no home folder.
        return Path(tempfile.gettempdir()) / f"movq-{os.getuid()}"


def is_writable(folder: Path) -> bool:
    """Return whether files can be made in a folder, or in its nearest existing parent if it does not exist."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return the SHA-256 of a large file, which is read once in this process unless it changes."""
    status = path.stat()
    return _known_sha256(path.absolute(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _known_sha256(path: Path, *_status: int) -> str:
    return sha256(path)


def _sync(folder: Path) -> None:
    """Write the names in a folder to the disk, if its file system can do so: some network file systems cannot."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
"""Error numbers of file systems that cannot write a folder to the disk, or not this one."""


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
