"""Locks of folders: one process at a time works in a folder, and the others can learn which process it is."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

_LOCKS = Path("/proc/locks")
"""File in which Linux lists all locks of the processes of this machine."""


def try_lock(folder: Path, *, shared: bool) -> int | None:
    """Lock a folder, which is created if it does not exist.

    Args:
        folder: Folder to lock.
        shared: Whether other processes that also pass `shared` may lock the folder at the same time.

    Returns:
        A descriptor that holds the lock until it is closed; None if another process has locked the folder.

    Raises:
        OSError: The folder cannot be created or opened.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            pass  # Some network file systems have no locks.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        os.close(descriptor)  # The process that had locked the folder has removed it.


def holder(folder: Path) -> str:
    """Return the process that has locked a folder as " (process 123)"; empty if the system does not say which."""
    with suppress(OSError, ValueError, IndexError):
        inode = folder.stat().st_ino
        fields = [line.split() for line in _LOCKS.read_text().splitlines()]
        # NUMBER: FLOCK ADVISORY WRITE PROCESS MAJOR:MINOR:INODE START END; the process is 0 outside of this container.
        found = {line[4] for line in fields if line[1] == "FLOCK" and int(line[5].rpartition(":")[2]) == inode}
        if len(found) == 1 and found.isdisjoint({"0", "-1"}):
            return f" (process {found.pop()})"
    return ""
