"""Classes of a validation folder without class folders, from a file: for ImageNet as it is distributed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from movq_cli.errors import BadRequestError
from movq_cli.sources.layout import is_image_folder
from movq_cli.sources.numbering import number_classes
from movq_cli.sources.source import Source
from movq_cli.sources.text_files import read_lines

_KAGGLE_HEADER = "ImageId,PredictionString"
_FORMS = (
    'The file may have lines "NAME SYNSET", or be the LOC_val_solution.csv of Kaggle or the val_annotations.txt of '
    "Tiny ImageNet, or have one synset for each image in the order of the names."
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
    folders = [_class_folder(PurePosixPath(name)) for name in source.names]
    trained = [folder if split == "train" else None for folder, split in zip(folders, source.splits, strict=True)]
    return label_by_list(source, trained, str(path), read_lines(path, "labels"))


def label_by_list(source: Source, classes: Sequence[str | None], origin: str, lines: Sequence[str]) -> Source:
    """Label the training images by given classes, and the held-out images by the lines of a list.

    Args:
        source: Source with splits.
        classes: Class of each training image; those of held-out images are ignored.
        origin: Name of the list for error messages.
        lines: Lines of the list. Its image names are compared without folder and suffix.

    Returns:
        The source with labels; its classes are in sorted order.

    Raises:
        BadRequestError: The form of the list is unknown, or it lacks an image.
    """
    assert source.splits is not None
    images = list(zip(map(PurePosixPath, source.names), source.splits, classes, strict=True))
    held_out = [path.stem for path, split, _ in images if split == "val"]
    trained = {known for _, split, known in images if split == "train" and known is not None}
    listed = _parse(origin, lines, held_out, trained)
    class_names = [(known or "") if split == "train" else listed.get(path.stem, "") for path, split, known in images]
    missing = class_names.count("")
    if missing:
        message = f"{origin} has no class for {missing} of the {len(held_out)} images in val, such as"
        raise BadRequestError(f"{message} {images[class_names.index('')][0].name}", _FORMS)
    unknown = sorted(set(class_names) - trained)
    if unknown:
        raise BadRequestError(
            f"{origin} names {len(unknown)} classes without a train folder, such as {unknown[0]}", _FORMS
        )
    labels, names = number_classes(class_names)
    return replace(source, labels=labels, classes=names, label_warnings=())


def _class_folder(path: PurePosixPath) -> str:
    """Return the name of the folder of an image, or that of its parent if it is called `images`."""
    return path.parents[1].name if is_image_folder(path.parent.name) else path.parent.name


def _parse(origin: str, lines: Sequence[str], held_out: Sequence[str], trained: set[str]) -> dict[str, str]:
    """Return the class of each image by its name without folder and suffix."""
    lines = [line.strip() for line in lines]
    rows = [re.split(r"[\s,]+", line) for line in lines if line and line != _KAGGLE_HEADER]
    if all(_is_tiny_imagenets(row, trained) for row in rows):
        rows = [row[:2] for row in rows]
    is_from_kaggle = _KAGGLE_HEADER in lines
    if rows and not is_from_kaggle and all(row[-1].isdecimal() and row[-1] not in trained for row in rows):
        message = f"{origin} holds numbers, whose order of classes is unknown (that of the devkit is in its meta.mat)"
        raise BadRequestError(message, f"Use a file with synsets (n01440764). {_FORMS}")
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(held_out):
            raise BadRequestError(f"{origin} has {len(rows)} lines for {len(held_out)} images in val", _FORMS)
        return {name: row[0] for name, row in zip(held_out, rows, strict=True)}
    if not is_from_kaggle and any(len(row) != 2 for row in rows):
        raise BadRequestError(f"{origin} is not a list of labels", _FORMS)
    return {PurePosixPath(row[0]).stem: row[1] for row in rows}


def _is_tiny_imagenets(row: Sequence[str], trained: set[str]) -> bool:
    """Return whether a row is one of Tiny ImageNet's: a name, a class and the four sides of a box."""
    return len(row) == 6 and row[1] in trained and all(map(str.isdecimal, row[2:]))
