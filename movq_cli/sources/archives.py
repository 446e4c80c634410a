"""Several archives that are one source: what their files are called, and what the archives' own names say of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from movq_cli.sources.layout import part_of
from movq_cli.sources.source import Source

_TAR = re.compile(r"\.(tar|tgz|tbz2?|txz)$|\.tar\.(gz|bz2|xz|lzma)$", re.IGNORECASE)
_UNREAD = frozenset([".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar"])
"""Suffixes of archives, which are not read inside another archive or beside images."""


def is_tar(name: str) -> bool:
    """Return whether a file has the name of a tar, compressed or not."""
    return _TAR.search(name) is not None


def is_zip(name: str) -> bool:
    """Return whether a file has the name of a zip archive."""
    return PurePosixPath(name).suffix.lower() == ".zip"


def extraction_remedy(suffixes: Collection[str]) -> str:
    """Return what makes archives of these suffixes readable, in parentheses; empty if none is that of an archive."""
    found = sorted(_UNREAD & set(suffixes))
    return f" (extract {' '.join(found)}, or name one of them as the source, to read what they hold)" if found else ""


def titles_of(paths: Sequence[Path]) -> list[str]:
    """Return a unique title of each archive: its path below the folder that all have in common, without suffixes."""
    common = os.path.commonpath([os.path.abspath(path.parent) for path in paths])  # noqa: PTH100 - links stay
    relative = [PurePosixPath(os.path.relpath(path, common)) for path in paths]
    titles = [str(path.with_name(path.name.split(".tar")[0]).with_suffix("")) for path in relative]
    counts = Counter(titles)
    return [title if counts[title] == 1 else str(path) for title, path in zip(titles, relative, strict=True)]


def places_of(names: Sequence[str], titles: Sequence[str], archives: Sequence[int]) -> list[str]:
    """Return the paths that give the splits and the classes of files in several archives.

    Args:
        names: Names of the files, which begin with the title of their archive.
        titles: Title of each archive. Its words give the split, if those of every archive do. It gives the class of
            an archive whose files all begin with it, as `n01440764.tar` holds `n01440764_36.JPEG`.
        archives: Number of the archive of each file [N].
    """
    parts = [part_of(title) for title in titles]
    folders = [f"{part}/" if None not in parts else "" for part in parts]
    inner = [name[len(titles[archive]) + 1 :] for name, archive in zip(names, archives, strict=True)]
    words = [PurePosixPath(title).name for title in titles]
    are_classes = [True] * len(titles)
    for name, archive in zip(inner, archives, strict=True):
        are_classes[archive] &= name.startswith(f"{words[archive]}_")
    classes = [f"{word}/" if is_class else "" for word, is_class in zip(words, are_classes, strict=True)]
    return [folders[archive] + classes[archive] + name for name, archive in zip(inner, archives, strict=True)]


def name_unused_titles(source: Source, titles: Sequence[str]) -> Source:
    """Return the source, with a sentence about its archives if they are no classes although their names could be.

    Args:
        source: Source of several archives.
        titles: Title of each archive. Titles that differ in numbers alone are no classes.
    """
    words = {re.sub(r"[0-9]+", "", title) for title in titles}
    if source.labels is not None or source.label_warnings or len(words) < 2 or None not in map(part_of, titles):
        return source
    warning = (
        f"the names of the {len(titles)} archives, such as {titles[0]}, are not used as classes. If they are classes, "
        "extract each archive into a folder of its name"
    )
    return replace(source, label_warnings=(warning,))
