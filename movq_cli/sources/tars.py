"""What tars hold: plain ones, and shards of WebDataset's kind, in which files of one key belong together."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CLASS_SUFFIXES = frozenset(["cls", "json"])
_MAX_CLASS_BYTES = 2**20


class TarFiles(NamedTuple):
    """The files in some tars, one after the other."""

    names: list[str]
    extents: NDArray[np.int64]  # [N, 3]: which tar, offset, length, bytes
    labels: list[int]  # what the class file of the same key says; -1 = there is none


def is_pattern(location: str) -> bool:
    """Whether a name stands for several, `train-{0000..0009}.tar`."""
    return _RANGE.search(location) is not None


def expanded(pattern: str) -> list[str]:
    """The names that a pattern stands for, the numbers as wide as its first one."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    names = (f"{pattern[: found.start()]}{n:0{len(found[1])}}{pattern[found.end() :]}" for n in numbers)
    return [name for part in names for name in expanded(part)]


def list_files(tars: Sequence[Path], prefixes: Sequence[str]) -> TarFiles:
    """List the files in uncompressed tars, without links, devices and sparse files.

    Args:
        tars: The tars.
        prefixes: Before the names of each one's files.

    Raises:
        OSError: One cannot be read.
        tarfile.TarError: One is damaged.
    """
    names: list[str] = []
    extents: list[tuple[int, int, int]] = []
    keys: list[tuple[int, str]] = []
    classes: dict[tuple[int, str], int] = {}
    for number, (path, prefix) in enumerate(zip(tars, prefixes, strict=True)):
        with tarfile.open(path, "r:") as archive:
            for member in _regular(archive):
                key, suffix = _key(member.name)
                if suffix in _CLASS_SUFFIXES:
                    with suppress(ValueError, KeyError, TypeError):
                        classes[number, key] = _class(archive, member, suffix)
                else:
                    names.append(prefix + member.name)
                    extents.append((number, member.offset_data, member.size))
                    keys.append((number, key))
    labels = [classes.get(key, -1) for key in keys] if classes else [-1] * len(keys)
    return TarFiles(names, np.array(extents, np.int64).reshape(-1, 3), labels)


def _regular(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Links hold no bytes, and a sparse file's are not in one piece."""
    while (member := archive.next()) is not None:
        if member.isreg() and not member.issparse():
            yield member
        # Else it keeps a kilobyte of each, of a million files a gigabyte.
        archive.members.clear()  # type: ignore[attr-defined]


def _key(name: str) -> tuple[str, str]:
    """WebDataset's: the path up to the first dot of the file's name, and what follows that dot."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}", suffix.lower()


def _class(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> int:
    file = archive.extractfile(member)
    assert file is not None
    text = file.read(_MAX_CLASS_BYTES)
    label = int(json.loads(text)["label"] if suffix == "json" else text)
    if label < 0:
        raise ValueError(label)
    return label


def alone(found: Sequence[str]) -> list[str]:
    """The tars among a folder's files, sorted."""
    return sorted(name for name in found if PurePosixPath(name).suffix.lower() == ".tar")
