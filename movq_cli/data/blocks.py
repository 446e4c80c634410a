"""Long work on many items, stored in blocks that are complete or absent, so that a killed run can be resumed.

The content of a block does not depend on the rank that makes it. So ranks share the blocks without communication, a
resumed run makes only the missing blocks, with any number of ranks, and the bytes are the same. If all ranks wrote into
one file, the blocks need not be joined, but a network file system may lose what two machines write to one page.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from movq_cli import digests
from movq_cli.console import Console, Progress
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_file, locked
from movq_cli.ranks import Ranks

Arrays = Mapping[str, NDArray[np.generic]]
"""The results for the items of a block, by name. Every array has the same number of rows per item."""


def locked_in_turn(folder: Path, command: str, ranks: Ranks, console: Console) -> AbstractContextManager[None]:
    """Return a context in which rank 0 has locked the folder of shared work; it waits for the command that has done so.

    The other ranks do not wait here: they must call a long barrier next. The work may be complete afterwards.

    Args:
        folder: Folder of the work.
        command: Name of the command that locks the folder.
        ranks: Ranks that share the work.
        console: Console for the line that says for whom this command waits.
    """
    reported: set[str] = set()

    def report_once(other: str) -> None:
        ranks.check_launcher()
        if not reported:
            console.warn(f"waiting for {other}, which is at work in {folder}; then its result is used")
        reported.add(other)

    return locked(folder, command, while_waiting=report_once) if ranks.is_first else nullcontext()


@dataclass(frozen=True)
class Blocks:
    """The blocks of a piece of work, and the files that hold them, `START-STOP.npz`."""

    folder: Path
    items: int  # number of items in all
    size: int  # largest number of items in a block
    rows: int = 1  # rows of the arrays per item

    def ranges(self) -> list[range]:
        """Return all blocks as ranges of items."""
        return [range(start, min(start + self.size, self.items)) for start in range(0, self.items, self.size)]

    def missing(self) -> list[range]:
        """Return the blocks that have not been made, or whose file is damaged."""
        existing = self._existing_files()
        return [
            block
            for block in self.ranges()
            if self._file(block).name not in existing or not _is_intact(self._file(block))
        ]

    def make(
        self,
        missing: list[range],
        make: Callable[[list[range]], Iterator[tuple[range, Arrays]]],
        ranks: Ranks,
        barrier: Callable[[], None],
        progress: Progress,
    ) -> None:
        """Make this rank's share of the missing blocks, and wait until the other ranks have made theirs.

        Args:
            missing: The missing blocks, the same on every rank.
            make: Function that yields each of some blocks, in order, with its results. It advances the progress by its
                own rows.
            ranks: Ranks that share the work.
            barrier: Function that waits for the other ranks, as `Ranks.long_barrier` gives it.
            progress: Progress in rows of all ranks; only rank 0 shows it.

        Raises:
            InterruptedRunError: The launcher of these ranks has ended; the finished blocks stay.
        """
        share = ranks.share(len(missing))
        # Rank 0, whose share is the first, shows the progress of all.
        others = _OtherRanks(self, missing[share.stop :] if ranks.is_first else [])
        for block, arrays in make(missing[share]):
            self._save(block, arrays)
            others.count(progress)
            ranks.check_launcher()
        barrier()
        others.count(progress)

    def join(self, name: str, path: Path) -> None:
        """Write the rows of all blocks as an `.npy` file, with one block in memory at a time.

        The file is written like any other one and not through a memory map, because a full disk would then kill the
        process with SIGBUS.

        Args:
            name: Name of the array in the blocks.
            path: Path of the file.

        Raises:
            FailureError: The file could not be written.
            BadRequestError: A block is damaged.
        """
        with atomic_file(path) as joined:
            for block in self.ranges():
                part = self._load(block, name)
                if block.start == 0:
                    description = np.lib.format.header_data_from_array_1_0(part)
                    description["shape"] = (self.items * self.rows, *part.shape[1:])
                    np.lib.format.write_array_header_1_0(joined, description)
                joined.write(part.data)

    def clear(self) -> None:
        """Remove the files, which are not needed after they are joined."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def count(self, blocks: list[range]) -> int:
        """Return the number of rows in those of the blocks that have been made."""
        existing = self._existing_files() if blocks else set()
        return self.rows * sum(len(block) for block in blocks if self._file(block).name in existing)

    def _save(self, block: range, arrays: Arrays) -> None:
        # Contested, because a rank of a killed run may live on for a while and write the same block.
        with atomic_file(self._file(block), concurrent=True) as file:
            np.savez(file, **dict[str, Any](arrays))
            digests.append_to_zip(file)

    def _load(self, block: range, name: str) -> NDArray[np.generic]:
        path = self._file(block)
        try:
            with np.load(path, allow_pickle=False) as file:
                return np.ascontiguousarray(file[name])
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            raise BadRequestError(f"{path} is damaged", "Run the same command again: it makes the file anew.") from None

    def _file(self, block: range) -> Path:
        """Return the file of a block. It is named after the items, so that blocks of another size are not confused."""
        return self.folder / f"{block.start:08d}-{block.stop:08d}.npz"

    def _existing_files(self) -> set[str]:
        return {path.name for path in self.folder.glob("*.npz")}


def _is_intact(path: Path) -> bool:
    try:
        return digests.check(path, "")
    except BadRequestError:
        return False


@dataclass
class _OtherRanks:
    """The progress of the other ranks, measured by their finished blocks."""

    all: Blocks
    blocks: list[range]  # the blocks of the other ranks
    counted: int = 0  # rows that the progress includes

    def count(self, progress: Progress) -> None:
        """Advance the progress by the rows that were finished since the last call."""
        found = self.all.count(self.blocks)
        progress.advance(found - self.counted)
        self.counted = found
