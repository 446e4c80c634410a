"""Splits and classes of images by their folders, and the images that belong to none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Literal

from movq_cli.data.shards import SplitName

Part = Literal["train", "val", "test"]
"""A part of a data set. The images of a test part are used neither for training nor for validation."""

_PARTS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""The part that a folder or an archive of this name holds, in lower case."""

_YEAR = re.compile(r"[_-]?[0-9]{1,4}$")
"""A year that may follow the name of a part: COCO has `train2017` and `val2017`."""

_IMAGE_FOLDERS = frozenset(["image", "images", "img", "imgs", "jpegimages"])
"""Names of folders, in lower case, that separate images from other files. They are no classes."""

_SYSTEM_FOLDERS = frozenset(
    ["__MACOSX", "@eaDir", "#recycle", "@Recycle", "@Recently-Snapshot", "lost+found", "$RECYCLE.BIN"]
) | {"System Volume Information"}
"""Folders in which operating systems and file servers store previews, deleted files and metadata."""

_BUCKET = re.compile("[0-9]{5,}")
_NUMBERED = re.compile(r"[A-Za-z_-]*([0-9]{1,18})")


@dataclass(frozen=True)
class Layout:
    """Splits and classes of images by their folders."""

    left_out: frozenset[int]
    """Indices of the images that belong to no split."""
    untrained: frozenset[int]
    """Indices of the images of the val split whose folder is no class of the train split, although others are."""
    splits: tuple[SplitName, ...] | None
    """Split of each image, "val" for those that are left out; None = there are no splits."""
    classes: tuple[str | None, ...]
    """Name of the class of each image; None = its folder is no class. Without classes, all are None."""
    warnings: tuple[str, ...]
    """Sentences about `left_out`."""
    untrained_warnings: tuple[str, ...]
    """Sentences about `untrained`, which are left out if the folders give the classes."""
    label_warnings: tuple[str, ...]
    """Sentences about folders that were not used as classes."""


def read_layout(names: Sequence[str]) -> Layout:
    """Read splits and classes from folders: `[common/...][train|val|test/][images/][class/][...]image`.

    - Train and val folders give splits. A test folder beside them is left out, and so is what lies beside train and
      val in no such folder.
    - A folder of the val split is a class only if the train split has a class of this name. If some are and some are
      not, the images of the others are left out.
    - Folders that only store parts of one numbered sequence (`00000/`, `01000/`) are no classes.

    Args:
        names: Names of the images.
    """
    folders = [name.split("/")[:-1] for name in names]
    depth = _common_depth(folders)
    parts = _parts(folders, depth)
    if parts is None:
        classes, label_warnings = _classes(names, folders, range(len(names)), depth)
        return Layout(frozenset(), frozenset(), None, _unless_few(classes, set(classes)), (), (), label_warnings)
    left_out = frozenset(index for index, part in enumerate(parts) if part not in {"train", "val"})
    of_split = {split: [index for index, part in enumerate(parts) if part == split] for split in ("train", "val")}
    train, label_warnings = _classes(names, folders, of_split["train"], depth + 1)
    val, _ = _classes(names, folders, of_split["val"], depth + 1)
    trained = set(train) - {None}
    by_index: dict[int, str | None] = dict(zip(of_split["train"], train, strict=True))
    untrained: list[int] = []
    if len(trained) > 1 and not trained.isdisjoint(val):
        by_index |= dict(zip(of_split["val"], val, strict=True))
        untrained = [index for index, name in zip(of_split["val"], val, strict=True) if name and name not in trained]
    listed = tuple(by_index.get(index) for index in range(len(names)))
    splits: tuple[SplitName, ...] = tuple("train" if part == "train" else "val" for part in parts)
    return Layout(
        left_out,
        frozenset(untrained),
        splits,
        _unless_few(listed, trained),
        tuple(_outside_warnings(names, parts)),
        tuple(_untrained_warnings(names, untrained)),
        label_warnings,
    )


def part_of(name: str) -> Part | None:
    """Return the part of a data set that the name of an archive contains, as `imagenet-validation-03`; None if none."""
    parts = [_PARTS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _PARTS]
    return "train" if "train" in parts else parts[0] if parts else None


def is_image_folder(name: str) -> bool:
    """Return whether a folder has a name as `images`, which says nothing about the images."""
    return name.lower() in _IMAGE_FOLDERS


def is_system_folder(name: str) -> bool:
    """Return whether a folder belongs to an operating system or a file server; what it holds is not read."""
    return name in _SYSTEM_FOLDERS


def is_visible(part: str) -> bool:
    """Return whether a file or folder is read by its name: not a hidden one, and none of a system."""
    return not part.startswith(".") and not is_system_folder(part)


def _common_depth(folders: Sequence[Sequence[str]]) -> int:
    """Return the number of folders that all images have in common, apart from images that lie above."""
    depth = 0
    while len(_folders_at(folders, depth) - {None}) == 1:
        depth += 1
    return depth


def _parts(folders: Sequence[Sequence[str]], depth: int) -> list[Part | None] | None:
    """Return the part of each image by its folder at a depth; None if these folders are no parts of a data set."""
    tops = {top for top in _folders_at(folders, depth) if top is not None}
    known = {_folder_part(top) for top in tops}
    found = known - {None}
    if len(found) < 2 or (None in known and "train" not in found):
        return None
    return [_folder_part(path[depth]) if depth < len(path) else None for path in folders]


def _folder_part(name: str) -> Part | None:
    return _PARTS.get(_YEAR.sub("", name.lower()))


def _outside_warnings(names: Sequence[str], parts: Sequence[Part | None]) -> list[str]:
    test = [index for index, part in enumerate(parts) if part == "test"]
    beside = [index for index, part in enumerate(parts) if part is None]
    warnings: list[str] = []
    if test:
        warnings.append(
            f"{len(test)} images of the test split were left out, such as {names[test[0]]}: they are used neither for "
            "training nor for validation. To read them, give their folder as the source, or rename it to val"
        )
    if beside:
        warnings.append(
            f"{len(beside)} images were left out, because they are in no train, val or test folder, such as "
            f"{names[beside[0]]}"
        )
    return warnings


def _untrained_warnings(names: Sequence[str], untrained: Sequence[int]) -> list[str]:
    if not untrained:
        return []
    return [
        f"{len(untrained)} images of the val split were left out, because the train split has no class of the name of "
        f"their folder, such as {names[untrained[0]]}"
    ]


def _classes(
    names: Sequence[str], folders: Sequence[Sequence[str]], indices: Sequence[int], depth: int
) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    """Return the class folder of some images, None for those without, and sentences about what was not used."""
    below = (folders[index][depth:] for index in indices)
    classes = tuple(next((name for name in path if not is_image_folder(name)), None) for path in below)
    if not _are_buckets([names[index] for index in indices], classes):
        return classes, ()
    first, last = min(filter(None, classes)), max(filter(None, classes))
    warning = f"the folders {first} to {last} store parts of one numbered sequence of images, and are no classes"
    return (None,) * len(classes), (warning,)


def _are_buckets(names: Sequence[str], folders: Sequence[str | None]) -> bool:
    """Return whether folders with numbers as names store consecutive parts of one numbered sequence."""
    ranges: dict[int, tuple[int, int]] = {}
    numbers: set[int] = set()
    for name, folder in zip(names, folders, strict=True):
        found = _NUMBERED.fullmatch(PurePosixPath(name).stem)
        if folder is None or found is None or _BUCKET.fullmatch(folder) is None:
            return False
        number = int(found[1])
        low, high = ranges.get(int(folder), (number, number))
        ranges[int(folder)] = min(low, number), max(high, number)
        numbers.add(number)
    ordered = [ranges[bucket] for bucket in sorted(ranges)]
    are_ascending = all(before[1] < after[0] for before, after in pairwise(ordered))
    return len(ordered) > 1 and len(numbers) == len(names) and are_ascending


def _unless_few(classes: Sequence[str | None], distinct: set[str | None]) -> tuple[str | None, ...]:
    """Return the classes if there are at least two of them, else None for each image."""
    return tuple(classes) if len(distinct - {None}) > 1 else (None,) * len(classes)


def _folders_at(folders: Sequence[Sequence[str]], depth: int) -> set[str | None]:
    """Return the names of the folders at a depth; None among them stands for images that lie above it."""
    return {path[depth] if depth < len(path) else None for path in folders}
