"""Numbers of classes: from their names, or from the numbers that a file gives them."""

from __future__ import annotations

from collections.abc import Sequence

from movq_cli.errors import BadRequestError
from movq_cli.text_encoding import storable_text

MAX_CLASSES = 2**16
"""Largest number of classes that are known by their numbers: a prior's classes and codes share a table of this size."""

Labels = tuple[tuple[int, ...], tuple[str, ...]]
"""The label of each image, and the names of the classes."""


def number_classes(class_names: Sequence[str]) -> Labels:
    """Turn the class name of each image into labels.

    A class that is named after a folder whose name is not UTF-8 gets a name that files of JSON can hold.

    Returns:
        The label of each image, and the classes in sorted order.
    """
    numbers = {name: number for number, name in enumerate(sorted(set(class_names)))}
    return tuple(numbers[name] for name in class_names), tuple(map(storable_text, numbers))


def class_numbers(origin: str, largest: int) -> tuple[str, ...]:
    """Return the names of the classes 0 to `largest`, which are their numbers.

    Args:
        origin: File or array that holds the numbers, for the error message.
        largest: Largest number of a class.

    Raises:
        BadRequestError: There would be more than `MAX_CLASSES` classes.
    """
    if largest >= MAX_CLASSES:
        number = str(largest) if largest < 10**20 else "of more than 20 digits"
        message = f"{origin} holds the class number {number}, but the largest possible one is {MAX_CLASSES - 1}"
        remedy = (
            "Correct it, or remove the class numbers: arr_1 of an .npz file, the .cls and .json files of a tar, "
            "dataset.json, the column label of a metadata file."
        )
        raise BadRequestError(message, remedy)
    return tuple(map(str, range(largest + 1)))


def number_values(origin: str, values: Sequence[int | str | None]) -> Labels | None:
    """Turn the values that a file gives to images, all of them numbers or all of them names, into labels.

    Args:
        origin: File that holds the values, for the error message.
        values: Value of each image.

    Returns:
        The labels and the classes; None if the values are mixed, negative or missing, or all the same name.

    Raises:
        BadRequestError: A number is too large for a class.
    """
    numbers = [value for value in values if isinstance(value, int)]
    if numbers and len(numbers) == len(values) and min(numbers) >= 0:
        return tuple(numbers), class_numbers(origin, max(numbers))
    class_names = [value for value in values if isinstance(value, str)]
    if len(class_names) == len(values) and len(set(class_names)) > 1:
        return number_classes(class_names)
    return None
