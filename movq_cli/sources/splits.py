"""Which images are held out: as the source says, as a list says, or a share drawn by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError
from movq_cli.sources.source import Source

_SALT = b"movq:"

NVIDIA = "nvidia"
_NVIDIA_FIRST = 60_000
"""NVIDIA's rule for FFHQ: the images from this number on are held out."""


def split_images(
    source: Source, val: str, val_list: Path | None, usable: Callable[[int], bool]
) -> dict[SplitName, list[int]]:
    """Decide which images are held out for validation.

    Args:
        source: Its own splits, where it has any, win.
        val: Else a share ("0.1") or a count ("500"), drawn by name; or "nvidia", FFHQ's images numbered 60000 and
            above. A single image is never held out.
        val_list: Else, before `val`, a file with the names of the held-out images, one a line.
        usable: Whether an image can be read: one of those drawn is made sure of, lest a small set with a bad image
            in the wrong place be left without validation.

    Returns:
        The indices of each split, in the source's order.

    Raises:
        BadRequestError: A split would be empty, or a line of the list does not name one image.
    """
    if source.splits is not None:
        held_out = {index for index, split in enumerate(source.splits) if split == "val"}
    elif val_list is not None:
        held_out = _listed(source, val_list)
    elif val == NVIDIA:
        held_out = _numbered(source)
    else:
        held_out = _drawn(source, _held_out_count(val, len(source)), usable)
    train = [index for index in range(len(source)) if index not in held_out]
    if not train:
        raise BadRequestError(f"every image of {source.location} is held out: none is left to train on")
    if not held_out and len(source) > 1:
        raise BadRequestError(f"no image of {source.location} is held out for validation", "Give it a val split too.")
    splits: dict[SplitName, list[int]] = {"train": train, "val": sorted(held_out)}
    return splits


def _held_out_count(val: str, images: int) -> int:
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
    fault = f"--val {val} does not hold out some of the {images} images"
    raise BadRequestError(fault, "Give a share such as 0.1, or a count such as 500.")


def _drawn(source: Source, count: int, usable: Callable[[int], bool]) -> set[int]:
    """A random choice that follows from the names alone: no library's stream of numbers can change it."""

    def rank(index: int) -> bytes:
        name = source.names[index].encode(errors="surrogateescape")
        return hashlib.sha256(_SALT + name).digest()

    ranked = sorted(range(len(source)), key=rank)
    chosen = ranked[:count]
    if chosen and not any(usable(index) for index in chosen):
        chosen[-1] = next((index for index in ranked[count:] if usable(index)), chosen[-1])
    return set(chosen)


def _numbered(source: Source) -> set[int]:
    stems = [PurePosixPath(name).stem for name in source.names]
    wrong = next((stem for stem in stems if not (stem.isascii() and stem.isdecimal())), None)
    if wrong is not None:
        fault = f"--val {NVIDIA} goes by numbers, and {source.location} has an image that is called {wrong!r}"
        raise BadRequestError(fault, "Give a share, a count, or --val-list.")
    held_out = {index for index, stem in enumerate(stems) if int(stem) >= _NVIDIA_FIRST}
    if not held_out:
        fault = f"--val {NVIDIA} holds out the images from {_NVIDIA_FIRST} on, and {source.location} has none"
        raise BadRequestError(fault, "Give a share, a count, or --val-list.")
    return held_out


def _listed(source: Source, val_list: Path) -> set[int]:
    """The images that a list names, by their whole path, file name, or file name without suffix."""
    try:
        wanted = {line.strip() for line in val_list.read_text(encoding="utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequestError(f"cannot read the list {val_list}: {error}") from None
    found: dict[str, list[int]] = {}
    for index, name in enumerate(source.names):
        path = PurePosixPath(name)
        for key in {name, path.name, path.stem}:
            found.setdefault(key, []).append(index)
    for name in sorted(wanted):
        matches = len(found.get(name, ()))
        if matches != 1:
            fault = f"{val_list} names {name!r}, which {matches or 'no'} images of {source.location} are called"
            raise BadRequestError(fault, "Each line must name one image, by its path inside the source if need be.")
    return {index for name in wanted for index in found[name]}
