"""The images in the rows of parquet files, read in any order with a bounded memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.array_files import reason_of
from movq_cli.data.images import BadImageError
from movq_cli.sources.source import UNREADABLE, check_bytes, stamp_of_file

BUFFER_BYTES = 2**20
"""Number of bytes that are read at once; without it, Arrow reads the column of a complete row group into memory.

A page is decompressed as a whole. Those that pyarrow writes hold at most 1,024 images."""

_CURSORS = 4
"""Number of row groups that are read in turns, for example those of two splits."""


@dataclass(frozen=True, eq=False)
class ParquetReader:
    """The images in parquet files, numbered by their rows. Rows that are read in order are decoded once."""

    paths: tuple[Path, ...]
    columns: tuple[str, ...]  # name of the column of images in each file
    groups: NDArray[np.int64]  # number of rows of each row group of all files [G]
    files: NDArray[np.int64]  # index of the file of each row group [G]
    states: dict[int, _State] = field(default_factory=dict, repr=False)
    """Open files of each process, by its id: a forked child shares neither locks nor decoders with its parent."""

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.groups)

    def read(self, member: int) -> bytes:
        """Return the bytes of an image.

        Raises:
            BadImageError: The row has no image, its row group is damaged before the end of this row, or the file
                has changed.
        """
        group = int(np.searchsorted(self._ends, member, side="right"))
        row = member - int(self._ends[group] - self.groups[group])
        state = self.states.setdefault(os.getpid(), _State())
        with state.lock:
            return state.read(group, row, lambda: self._rows(group))

    def stamp(self, member: int) -> tuple[int, int]:
        """Return the size and the time of change of the image's file."""
        group = int(np.searchsorted(self._ends, member, side="right"))
        return stamp_of_file(self.paths[self.files[group]])

    def _rows(self, group: int) -> Iterator[Any]:
        """Yield the values of `bytes` in a row group, decoded one by one."""
        import pyarrow.parquet as pq

        index = int(self.files[group])
        first = int(np.searchsorted(self.files, index))
        # The decoders of a row group use no threads: a process that was forked from another one has none of them.
        with pq.ParquetFile(self.paths[index], buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            column = f"{self.columns[index]}.bytes"
            for batch in file.iter_batches(1, row_groups=[group - first], columns=[column], use_threads=False):
                yield from batch.column(0).field("bytes")

    def __reduce__(self) -> tuple[type[ParquetReader], tuple[Any, ...]]:
        return ParquetReader, (self.paths, self.columns, self.groups, self.files)


class _State:
    """The row groups that a process is reading."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.cursors: dict[int, tuple[int, Iterator[Any]]] = {}  # next row and iterator by row group, the latest last
        self.damages: dict[int, tuple[int, str]] = {}  # first unreadable row and reason, by row group

    def read(self, group: int, row: int, rows: Callable[[], Iterator[Any]]) -> bytes:
        """Return the bytes in a row; `rows` starts to read the row group."""
        import pyarrow

        damaged_from, reason = self.damages.get(group, (row + 1, ""))
        if row >= damaged_from:
            raise BadImageError(reason)
        position, values = self.cursors.pop(group, (0, None))
        if values is None or position > row:
            position, values = 0, rows()
        try:
            while position <= row:
                value = next(values)
                position += 1
        except (*UNREADABLE, pyarrow.ArrowException, StopIteration) as error:
            reason = "the file has fewer rows than before" if isinstance(error, StopIteration) else reason_of(error)
            self.damages[group] = position, f"cannot be read: {first_line(reason)}"
            raise BadImageError(self.damages[group][1]) from None
        self.cursors[group] = position, values
        if len(self.cursors) > _CURSORS:
            del self.cursors[next(iter(self.cursors))]
        if not value.is_valid:
            raise BadImageError("the row has no bytes of an image")
        check_bytes(len(value.as_buffer()))
        return value.as_py()


def first_line(text: str) -> str:
    """Return the first line of a text: an exception of pyarrow may have several."""
    return text.partition("\n")[0]
