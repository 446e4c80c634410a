"""Split of a source into training and held-out images: by the source, by a list, by number, or at random."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError
from movq_cli.sources.source import Source
from movq_cli.sources.text_files import read_lines

_SALT = b"movq:"

NVIDIA = "nvidia"
"""Name of NVIDIA's rule for FFHQ."""

_NUMBER = re.compile("[0-9]{1,18}")
_NVIDIA_FIRST = 60_000
"""Number of the first image that NVIDIA's rule holds out."""


def split_images(
    source: Source, val: str, val_list: Path | None, is_usable: Callable[[int], bool]
) -> dict[SplitName, list[int]]:
    """Decide which images are held out for validation.

    Args:
        source: Source of the images. Its own val split, if it has one, takes precedence over `val`.
        val: A share ("0.1") or a number ("500") of images, chosen by a hash of their names; or "nvidia", which holds
            out the images numbered 60000 and above, as for FFHQ. A single image is never held out.
        val_list: File with the names of the held-out images, one in each line; it takes precedence over `val`.
        is_usable: Function that returns whether the image of an index can be used. If none of the images chosen by
            `val` can, one that can replaces the last: otherwise a small set with one bad image could lose its
            validation split.

    Returns:
        The indices of each split's images, ascending.

    Raises:
        BadRequestError: A split would be empty, a line of the list does not name one image, or the source has a val
            split beside which the list would have no effect.
    """
    if source.has_val and val_list is not None:
        message = f"{source.location} has a val split of its own, beside which --val-list {val_list} has no effect"
        raise BadRequestError(message, "Leave --val-list out, or name its train folder as the source.")
    if source.has_val:
        assert source.splits is not None
        held_out = {index for index, split in enumerate(source.splits) if split == "val"}
    elif val_list is not None:
        held_out = _listed(source, val_list)
    elif val == NVIDIA:
        held_out = _numbered(source)
    else:
        held_out = _drawn(source, _held_out_count(val, len(source)), is_usable)
    train = [index for index in range(len(source)) if index not in held_out]
    if not train:
        raise BadRequestError(f"every image of {source.location} is held out, so that none is left to train on")
    if not held_out and len(source) > 1:
        raise BadRequestError(f"no image of {source.location} is held out for validation", "Give it a val split too.")
    splits: dict[SplitName, list[int]] = {"train": train, "val": sorted(held_out)}
    return splits


def _held_out_count(val: str, images: int) -> int:
    """Return the number of held-out images for a share or a number of images."""
    if images == 1:
        return 0
    try:
        share, count = (float(val), 0) if "." in val else (None, int(val))
    except ValueError:
        share, count = None, 0
    if share is not None and 0.0 < share < 1.0:
        return min(max(1, round(share * images)), images - 1)
    if share is None and 0 < count < images:
        return count
    message = f"--val {val} does not hold out some, but not all, of the {images} images"
    raise BadRequestError(message, "Give a share such as 0.1, or a number such as 500.")


def _drawn(source: Source, count: int, is_usable: Callable[[int], bool]) -> set[int]:
    """Choose images by a hash of their names, so that no library's random numbers can change the choice."""

    def rank(index: int) -> bytes:
        name = source.names[index].encode(errors="surrogateescape")
        return hashlib.sha256(_SALT + name).digest()

    ranked = sorted(range(len(source)), key=rank)
    chosen = ranked[:count]
    if chosen and not any(is_usable(index) for index in chosen):
        chosen[-1] = next((index for index in ranked[count:] if is_usable(index)), chosen[-1])
    return set(chosen)


def _numbered(source: Source) -> set[int]:
    """Choose images by NVIDIA's rule."""
    stems = [PurePosixPath(name).stem for name in source.names]
    wrong = next((stem for stem in stems if _NUMBER.fullmatch(stem) is None), None)
    if wrong is not None:
        message = f"--val {NVIDIA} needs numbers as names, but {source.location} has an image that is called {wrong!r}"
        raise BadRequestError(message, "Give a share, a number of images, or --val-list.")
    held_out = {index for index, stem in enumerate(stems) if int(stem) >= _NVIDIA_FIRST}
    if not held_out:
        message = f"--val {NVIDIA} holds out the images from {_NVIDIA_FIRST} on, but {source.location} has none"
        raise BadRequestError(message, "Give a share, a number of images, or --val-list.")
    return held_out


def _listed(source: Source, val_list: Path) -> set[int]:
    """Choose the images that a list names: by their path, their file name, or their file name without suffix."""
    # macOS stores the parts of an accented letter in a name, and other systems the letter.
    listed = {unicodedata.normalize("NFC", line.strip()) for line in read_lines(val_list, "list")} - {""}
    found: dict[str, list[int]] = {}
    for index, name in enumerate(source.names):
        path = PurePosixPath(unicodedata.normalize("NFC", name))
        for key in {str(path), path.name, path.stem}:
            found.setdefault(key, []).append(index)
    for name in sorted(listed):
        matches = len(found.get(name, ()))
        if matches != 1:
            message = f"{val_list} names {name!r}, which is the name of {matches or 'no'} images of {source.location}"
            raise BadRequestError(message, "Each line must name one image, if necessary by its path in the source.")
    return {index for name in listed for index in found[name]}
