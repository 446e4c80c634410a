"""The classes of a flat validation folder, from the files that say them: ImageNet as it is distributed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from movq_cli.errors import BadRequestError
from movq_cli.sources.source import Source

_KAGGLE = "ImageId,PredictionString"
_FORMS = (
    'Lines may be "NAME SYNSET", Kaggle\'s LOC_val_solution.csv, or one synset for each image in the order of names.'
)


def label_held_out(source: Source, path: Path) -> Source:
    """The source with the classes of its train folders, and with those that a file says for the images held out.

    Args:
        source: With class folders in its train split; those of its val split, if any, do not count.
        path: The file. Its names are compared without folder and suffix.

    Returns:
        The source, its labels in sorted order of the classes.

    Raises:
        BadRequestError: The source has no such splits, the file is of no known form, or it lacks an image.
    """
    if source.splits is None:
        raise BadRequestError(f"{source.location} has no train and val folders, to which --val-labels could apply")
    paths = [PurePosixPath(name) for name in source.names]
    held_out = [path.stem for path, split in zip(paths, source.splits, strict=True) if split == "val"]
    trained = {path.parent.name for path, split in zip(paths, source.splits, strict=True) if split == "train"}
    known = _read(path, held_out, trained)
    found = [
        path.parent.name if split == "train" else known.get(path.stem, "")
        for path, split in zip(paths, source.splits, strict=True)
    ]
    missing = found.count("")
    if missing:
        fault = f"{path} says no class of {missing} of the {len(held_out)} images in val, such as"
        raise BadRequestError(f"{fault} {paths[found.index('')].name}", _FORMS)
    unknown = sorted(set(found) - trained)
    if unknown:
        raise BadRequestError(
            f"{path} names {len(unknown)} classes without a train folder, such as {unknown[0]}", _FORMS
        )
    numbers = {name: number for number, name in enumerate(sorted(trained))}
    return replace(source, labels=tuple(numbers[name] for name in found), classes=tuple(numbers))


def _read(path: Path, held_out: Sequence[str], trained: set[str]) -> dict[str, str]:
    """The class of each image by its name without folder and suffix."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequestError(f"cannot read the labels {path}: {error}") from None
    rows = [re.split(r"[\s,]+", line) for line in lines if line and line != _KAGGLE]
    kaggles = _KAGGLE in lines
    if rows and not kaggles and all(row[-1].isdecimal() and row[-1] not in trained for row in rows):
        fault = f"{path} holds numbers, and does not say of which order (the devkit's is one of its own, in meta.mat)"
        raise BadRequestError(fault, f"Use a file with synsets (n01440764). {_FORMS}")
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(held_out):
            raise BadRequestError(f"{path} has {len(rows)} lines for {len(held_out)} images in val", _FORMS)
        return {name: row[0] for name, row in zip(held_out, rows, strict=True)}
    if not kaggles and any(len(row) != 2 for row in rows):
        raise BadRequestError(f"{path} is no list of labels", _FORMS)
    return {PurePosixPath(row[0]).stem: row[1] for row in rows}
