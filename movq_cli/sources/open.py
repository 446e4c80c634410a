"""Opens any source: finds the kind that matches a location."""

from __future__ import annotations

import pkgutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError, did_you_mean
from movq_cli.sources import kinds
from movq_cli.sources.kinds.named import SETS
from movq_cli.sources.source import KINDS, READ_ERRORS, Source

for _module in pkgutil.iter_modules(kinds.__path__):
    import_module(f"{kinds.__name__}.{_module.name}")  # each file registers the kinds of source that it defines


def open_source(location: str, split: SplitName | None = None) -> Source:
    """List the images of a source.

    Args:
        location: Path of a folder, a zip, a tar (compressed or not), a folder of tars, an .npz file of pixels, a .txt
            list of images, an image or a prepared data set; or several tars as a range of numbers,
            `train-{0000..0009}.tar`; or a name from `SETS`. An existing path wins over a name.
        split: Restricts the source to one split; None opens all images.

    Returns:
        The source. In folders and archives, class folders give the labels, and folders named `train` and `val` give
        the splits.

    Raises:
        BadRequestError: The location is neither a path nor a name, holds no image, cannot be read, or lacks the split.
        FailureError: A set cannot be downloaded, or an archive cannot be decompressed.
    """
    path = Path(location)
    with _named_in_errors(path):
        ordered = sorted(KINDS, key=lambda kind: kind.is_fallback) if location else []
        kind = next((kind for kind in ordered if kind.matches(location, path)), None)
        if kind is None:
            raise BadRequestError(
                f"no file or folder at {location!r}, nor a set of that name", did_you_mean(location, SETS)
            )
        source = kind.open(location, path)
    return source if split is None else source.only_split(split)


@contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one line that names the path."""
    try:
        yield
    except (*READ_ERRORS, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadRequestError(f"cannot read {getattr(error, 'filename', None) or path}: {reason}") from error
