"""Open any source: find the kind of source that a location belongs to."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from movq_cli.data.array_files import reason_of
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError, did_you_mean
from movq_cli.sources import kinds
from movq_cli.sources.source import UNREADABLE, Source, SourceKind


def open_source(location: str, split: SplitName | None = None) -> Source:
    """List the images of a source.

    Args:
        location: Path of a folder, a zip, a tar (compressed or not), a parquet file, a folder of zips, tars or parquet
            files, an .npz of pixels, a .txt list of images, an image or a prepared set; or tars with a range of
            numbers, `train-{0000..0009}.tar`; or the name of a public data set. A path that exists takes precedence
            over a name.
        split: Split whose images are listed; None lists all images.

    Returns:
        The source. In folders and archives, labels come from class folders and splits from `train` and `val`.

    Raises:
        BadRequestError: The location is neither a path nor a name, holds no image, cannot be read, or has no such
            split.
        FailureError: A data set could not be downloaded, or an archive could not be extracted.
    """
    with _reading(Path(location)):
        path = Path(location) if location != "" and Path(location).exists() else None
        if path is not None and not (path.is_file() or path.is_dir()):
            raise BadRequestError(f"{path} is a device or a pipe, from which images cannot be read in any order")
        kind = next((kind for kind in source_kinds() if kind.matches(location, path)), None)
        if kind is None:
            names = [name for kind in source_kinds() for name in kind.set_names]
            raise BadRequestError(
                f"{location!r} is neither a file or folder nor the name of a data set", did_you_mean(location, names)
            )
        source = kind.open(location, path)
    return source if split is None else source.only_split(split)


@cache
def source_kinds() -> tuple[SourceKind, ...]:
    """Return all kinds of sources in the order in which they are tried: fallbacks last, else by their file's name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(kinds.__path__))
    found = [importlib.import_module(f"{kinds.__name__}.{name}").KIND for name in modules]
    return tuple(sorted(found, key=lambda kind: kind.is_fallback))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what an unreadable file raises into an error that names it."""
    try:
        yield
    except UNREADABLE as error:
        name = getattr(error, "filename", None) or path
        raise BadRequestError(f"cannot read {name}: {reason_of(error)}") from error
