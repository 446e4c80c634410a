"""Classes of a validation folder without class folders, from a file: for ImageNet as it is distributed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from movq_cli.errors import BadRequestError
from movq_cli.sources.labels import number_classes
from movq_cli.sources.source import Source
from movq_cli.sources.text_files import read_lines

_KAGGLE_HEADER = "ImageId,PredictionString"
_FORMS = (
    'The file may have lines "NAME SYNSET", or be Kaggle\'s LOC_val_solution.csv, or have one synset for each image in '
    "the order of the names."
)


def label_held_out(source: Source, path: Path) -> Source:
    """Label the training images by their class folders, and the held-out images by a file.

    Args:
        source: Source with class folders in its train split; class folders in its val split are ignored.
        path: Path of the file. Its image names are compared without folder and suffix.

    Returns:
        The source with labels; its classes are in sorted order.

    Raises:
        BadRequestError: The source has no splits, the form of the file is unknown, or it lacks an image.
    """
    if source.splits is None:
        raise BadRequestError(f"{source.location} has no train and val folders, to which --val-labels could apply")
    paths = [PurePosixPath(name) for name in source.names]
    held_out = [path.stem for path, split in zip(paths, source.splits, strict=True) if split == "val"]
    trained = {path.parent.name for path, split in zip(paths, source.splits, strict=True) if split == "train"}
    known = _read(path, held_out, trained)
    class_names = [
        path.parent.name if split == "train" else known.get(path.stem, "")
        for path, split in zip(paths, source.splits, strict=True)
    ]
    missing = class_names.count("")
    if missing:
        message = f"{path} has no class for {missing} of the {len(held_out)} images in val, such as"
        raise BadRequestError(f"{message} {paths[class_names.index('')].name}", _FORMS)
    unknown = sorted(set(class_names) - trained)
    if unknown:
        raise BadRequestError(
            f"{path} names {len(unknown)} classes without a train folder, such as {unknown[0]}", _FORMS
        )
    labels, classes = number_classes(class_names)
    return replace(source, labels=labels, classes=classes)


def _read(path: Path, held_out: Sequence[str], trained: set[str]) -> dict[str, str]:
    """Return the class of each image by its name without folder and suffix."""
    lines = [line.strip() for line in read_lines(path, "labels", encoding="utf-8-sig")]
    rows = [re.split(r"[\s,]+", line) for line in lines if line and line != _KAGGLE_HEADER]
    is_from_kaggle = _KAGGLE_HEADER in lines
    if rows and not is_from_kaggle and all(row[-1].isdecimal() and row[-1] not in trained for row in rows):
        message = f"{path} holds numbers, whose order of classes is unknown (that of the devkit is in its meta.mat)"
        raise BadRequestError(message, f"Use a file with synsets (n01440764). {_FORMS}")
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(held_out):
            raise BadRequestError(f"{path} has {len(rows)} lines for {len(held_out)} images in val", _FORMS)
        return {name: row[0] for name, row in zip(held_out, rows, strict=True)}
    if not is_from_kaggle and any(len(row) != 2 for row in rows):
        raise BadRequestError(f"{path} is not a list of labels", _FORMS)
    return {PurePosixPath(row[0]).stem: row[1] for row in rows}
