"""Long work on many items, kept in blocks that are whole or absent: what a killed run has made is not made again.

A block does not depend on who makes it. So ranks share the blocks without a word, a killed run goes on with those that
are not there, on as many ranks as it then has, and the bytes are the same. One file into which all ranks write would
save the joining, but a network file system may lose what two machines write to one page.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from movq_cli.console import Progress
from movq_cli.files import atomic_path
from movq_cli.ranks import Ranks

Arrays = Mapping[str, NDArray[np.generic]]
"""What is made of a block's items, by name; each has the same number of rows an item."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a piece of work and the files that hold them, `START-STOP.npz`."""

    folder: Path
    items: int
    size: int  # items in a block, at most
    rows: int = 1  # that an item makes

    def ranges(self) -> list[range]:
        """All blocks, as ranges of items."""
        return [range(start, min(start + self.size, self.items)) for start in range(0, self.items, self.size)]

    def missing(self) -> list[range]:
        """The blocks that have not been made."""
        there = self._there()
        return [block for block in self.ranges() if self._file(block).name not in there]

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
            missing: The same on every rank.
            make: Gives blocks, in their order, and what was made of them; it tells the progress of its own rows.
            ranks: Who shares the work.
            barrier: Waits for the others, as `Ranks.meeting` gives it.
            progress: Of rows, all ranks' together; rank 0 alone shows it.

        Raises:
            InterruptedRunError: The launcher of these ranks is gone; the blocks made so far are kept.
        """
        share = ranks.share(len(missing))
        # Rank 0, whose share is the first, speaks for all.
        others = _Others(self, missing[share.stop :] if ranks.is_first else [])
        for block, arrays in make(missing[share]):
            self._save(block, arrays)
            others.count(progress)
            ranks.check_launcher()
        barrier()
        others.count(progress)

    def join(self, name: str, path: Path) -> None:
        """Write all blocks' rows of one name as an `.npy` file, a block in memory at a time."""
        with atomic_path(path) as partial:
            joined: NDArray[np.generic] | None = None
            for block in self.ranges():
                with np.load(self._file(block), allow_pickle=False) as file:
                    part = file[name]
                if joined is None:
                    shape = (self.items * self.rows, *part.shape[1:])
                    joined = np.lib.format.open_memmap(partial, mode="w+", dtype=part.dtype, shape=shape)
                joined[block.start * self.rows : block.stop * self.rows] = part
            assert isinstance(joined, np.memmap)
            joined.flush()

    def clear(self) -> None:
        """Remove the files, which are needed no longer once they are joined."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def count(self, blocks: list[range]) -> int:
        """Rows of those of the blocks that have been made."""
        there = self._there() if blocks else set()
        return self.rows * sum(len(block) for block in blocks if self._file(block).name in there)

    def _save(self, block: range, arrays: Arrays) -> None:
        # Contested: a rank of a run that was killed may outlive it for a while, and be at the same block.
        with atomic_path(self._file(block), concurrent=True) as partial, partial.open("wb") as file:
            np.savez(file, **dict[str, Any](arrays))

    def _file(self, block: range) -> Path:
        """A block's file, named by its items: where blocks have another size, it is not taken for one of them."""
        return self.folder / f"{block.start:08d}-{block.stop:08d}.npz"

    def _there(self) -> set[str]:
        return {path.name for path in self.folder.glob("*.npz")}


@dataclass
class _Others:
    """The other ranks' progress, as far as their finished blocks tell."""

    all: Blocks
    blocks: list[range]
    counted: int = 0

    def count(self, progress: Progress) -> None:
        """Add what has come since the last time."""
        found = self.all.count(self.blocks)
        progress.advance(found - self.counted)
        self.counted = found
