"""Parquet files of images, as the `datasets` library of Hugging Face writes them.

Such a file has a column of images, `struct<bytes: binary, path: string>`, and often a column of class numbers, whose
names are in the metadata of its schema.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from movq_cli.data.array_files import reason_of
from movq_cli.errors import BadRequestError
from movq_cli.sources.arrays import MAX_IMAGES
from movq_cli.sources.labels import assemble, unlabelled_warning
from movq_cli.sources.layout import part_of
from movq_cli.sources.numbering import number_values
from movq_cli.sources.parquet_rows import BUFFER_BYTES, ParquetReader, first_line
from movq_cli.sources.source import UNREADABLE, Source, SourceKind
from movq_cli.text_encoding import storable_text

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_SUFFIX = ".parquet"

_IMAGE_COLUMNS = ("image", "img")
"""Names of the column of images that are preferred if a file has several."""
_LABEL_COLUMN = "label"
_METADATA = b"huggingface"

_LFS_POINTER = b"version https://git-lfs"
_MAX_CHARACTERS = 60
"""Number of characters, from the end, of an image's former name that stay: a name may have 255 bytes in a folder."""


class ParquetKind(SourceKind):
    """A single parquet file; the folder kind opens folders of them."""

    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether the path is a file with the suffix of parquet files."""
        return path is not None and not path.is_dir() and is_parquet(path.name)

    def open(self, location: str, path: Path | None) -> Source:
        """List the images of the file."""
        assert path is not None
        return open_parquet(location, [path], [path.name])


def is_parquet(name: str) -> bool:
    """Return whether a file has the name of a parquet file."""
    return PurePosixPath(name).suffix.lower() == _SUFFIX


def open_parquet(location: str, paths: Sequence[Path], titles: Sequence[str]) -> Source:
    """List the images in parquet files, in the order of their rows.

    Args:
        location: Location as the user gave it.
        paths: The files.
        titles: Unique name of each file, its path below the folder of the source. The words of the file's name, or
            else those of its folders, give the split if there are several files.

    Returns:
        The source. An image is named after its file, its row, and the name that it had before. The classes are the
        values of the column `label`, or of the only column of classes that the metadata describes.

    Raises:
        BadRequestError: A file cannot be read or has no column of images, or some files have a split and others have
            none.
    """
    _require_pyarrow()
    tables = [_read_table(path) for path in paths]
    digits = max(6, *(len(str(len(table.labels))) for table in tables))
    names: list[str] = []
    for title, table in zip(titles, tables, strict=True):
        stem = title[: -len(_SUFFIX)]
        names += [f"{stem}/{row:0{digits}d}{_suffix(original)}" for row, original in enumerate(table.originals)]
    if not names:
        raise BadRequestError(f"no image in {location}: its parquet files have no rows")
    reader = ParquetReader(
        tuple(paths),
        tuple(table.column for table in tables),
        np.concatenate([table.groups for table in tables]),
        np.concatenate([np.full(len(table.groups), index) for index, table in enumerate(tables)]),
    )
    counts = [len(table.labels) for table in tables]
    source = assemble(location, names, reader, is_list=True, places=_places(names, titles, counts))
    return _with_labels(source, paths, tables)


class _Table(NamedTuple):
    """The content of a parquet file that is read before its images."""

    column: str  # name of the column of images
    groups: NDArray[np.int64]  # number of rows of each row group [G]
    originals: list[str | None]  # path of each image before it was put into the file; None = unknown
    labels: list[int | str | None]  # value of each image's class; None = there is none
    classes: tuple[str, ...]  # names of the classes in the metadata; empty = there are none
    warnings: tuple[str, ...]  # sentences about images that were not used
    label_warnings: tuple[str, ...]  # sentences about classes that were not used


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError:
        raise BadRequestError("parquet files are read with pyarrow", "Run: pip install 'movq[parquet]'") from None


def _read_table(path: Path) -> _Table:
    """Read what a file has beside its images.

    Raises:
        BadRequestError: The file is damaged, or has no column of images.
    """
    import pyarrow
    import pyarrow.parquet as pq

    with path.open("rb") as start:
        if start.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise BadRequestError(f"{path} is a pointer of Git LFS, and not the file itself", "Run: git lfs pull")
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            return _table_of(path, file)
    except (*UNREADABLE, pyarrow.ArrowException) as error:
        message = f"cannot read the parquet file {path}: {first_line(reason_of(error))}"
        raise BadRequestError(message, "Download or copy it again.") from None


def _table_of(path: Path, file: ParquetFile) -> _Table:
    import pyarrow

    schema = file.schema_arrow
    images = [column.name for column in schema if _is_image(column.type)]
    if not images:
        found = ", ".join(f"{column.name} ({str(column.type)[:40]})" for column in schema)
        message = f"{path} has no column of images, struct<bytes: binary, path: string>, but {found or 'no column'}"
        raise BadRequestError(message, "Name a folder or a file that has one.")
    column = next((name for name in _IMAGE_COLUMNS if name in images), images[0])
    others = [name for name in images if name != column]
    warnings = [f"{path.name} has several columns of images: {column} is used, and not {', '.join(others)}"]
    groups = np.array([file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)], np.int64)
    rows = int(groups.sum())
    if rows > MAX_IMAGES:
        message = f"{path} states {rows} rows, but at most {MAX_IMAGES} can be read from one file"
        raise BadRequestError(message, "Download it again, or save it as several files.")
    described = _described_classes(schema.metadata or {})
    label, label_warnings = _label_column(path, schema.names, described)
    names = described.get(label, ()) if label is not None else ()
    labels: list[int | str | None] = [None] * rows
    if label is not None:
        kind = schema.field(label).type
        if pyarrow.types.is_integer(kind) or _is_text(kind):
            labels = file.read([label], use_threads=False).column(0).to_pylist()
        else:
            label_warnings = (f"the column {label} of {path.name} holds {kind} and no classes: it was not used",)
    originals: list[str | None] = [None] * rows
    if any(child.name == "path" and _is_text(child.type) for child in schema.field(column).type):
        chunks = file.read([f"{column}.path"], use_threads=False).column(0).chunks
        originals = [original for chunk in chunks for original in chunk.field("path").to_pylist()]
    if len(labels) != rows or len(originals) != rows:
        raise ValueError(f"its footer states {rows} rows, but its columns have others")
    return _Table(column, groups, originals, labels, names, tuple(warnings) if others else (), label_warnings)


def _is_image(kind: Any) -> bool:  # noqa: ANN401 - a type of pyarrow
    """Return whether the type of a column is that of images: a struct with a field `bytes`."""
    import pyarrow

    if not pyarrow.types.is_struct(kind):
        return False
    types = {child.name: child.type for child in kind}
    found = types.get("bytes")
    return found is not None and (pyarrow.types.is_binary(found) or pyarrow.types.is_large_binary(found))


def _is_text(kind: Any) -> bool:  # noqa: ANN401 - a type of pyarrow
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _described_classes(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Return the names of the classes of each column that the metadata of the `datasets` library describes."""
    try:
        features = json.loads(metadata[_METADATA])["info"]["features"]
        described = {name: entry["names"] for name, entry in features.items() if entry.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    are_names = {name: isinstance(names, list) and len(names) > 0 for name, names in described.items()}
    return {name: _unique(list(map(str, names))) for name, names in described.items() if are_names[name]}


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, those that several classes have with the number of their class: ImageNet has two of `crane`."""
    counts = Counter(names)
    numbered = (name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(names))
    return tuple(map(storable_text, numbered))


def _label_column(
    path: Path, names: Sequence[str], described: dict[str, tuple[str, ...]]
) -> tuple[str | None, tuple[str, ...]]:
    """Return the name of the column of classes, None if there is none, and sentences about what was not used."""
    if _LABEL_COLUMN in names:
        return _LABEL_COLUMN, ()
    candidates = [name for name in described if name in names]
    if len(candidates) < 2:
        return next(iter(candidates), None), ()
    listed = ", ".join(candidates)
    return None, (f"{path.name} has several columns of classes, {listed}, and none is called label: none was used",)


def _places(names: Sequence[str], titles: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Return the path that gives the split of each image.

    Raises:
        BadRequestError: The names of some files have a split, and those of others have none.
    """
    parts = [_part(title) for title in titles] if len(titles) > 1 else [None]
    if None in parts and any(parts):
        title = titles[parts.index(None)]
        message = f"the name of {title} says no split, as those of other parquet files do: train, validation or test"
        raise BadRequestError(message, "Rename it, or move it out of the folder.")
    folders = [part for part, count in zip(parts, counts, strict=True) for _ in range(count)]
    files = (name.rsplit("/", 1)[-1] for name in names)
    return [file if folder is None else f"{folder}/{file}" for folder, file in zip(folders, files, strict=True)]


def _part(title: str) -> str | None:
    """Return the part of a data set that a path names, by its last component that names one."""
    components = reversed(PurePosixPath(title).with_suffix("").parts)
    return next((part for component in components if (part := part_of(component)) is not None), None)


def _suffix(original: str | None) -> str:
    """Return what follows the row in the name of an image: the name that it had before."""
    base = (original or "").replace("\\", "/").rsplit("/", 1)[-1]
    return f"-{base[-_MAX_CHARACTERS:]}" if base else ""


def _with_labels(source: Source, paths: Sequence[Path], tables: Sequence[_Table]) -> Source:
    """Return the source with the labels of its files, or with a sentence why they are not used.

    Raises:
        BadRequestError: A number is too large for a class.
    """
    warnings = dict.fromkeys(sentence for table in tables for sentence in table.warnings)
    source = replace(source, warnings=(*source.warnings, *warnings))
    label_warnings = dict.fromkeys(sentence for table in tables for sentence in table.label_warnings)
    every = [None if label == -1 else label for table in tables for label in table.labels]  # datasets: -1 = unknown
    labels = [every[member] for member in source.members]
    if all(label is None for label in labels):
        return replace(source, label_warnings=(*source.label_warnings, *label_warnings))
    if not label_warnings:
        label_warnings = dict.fromkeys(_label_violations(source, paths, tables, labels))
    if label_warnings:
        return replace(source, label_warnings=(*source.label_warnings, *label_warnings))
    numbers = tuple(label for label in labels if isinstance(label, int))
    classes = tables[0].classes
    known = (numbers, classes) if classes else number_values(f"the column of labels of {source.location}", labels)
    if known is None or len(known[1]) == 1:
        return source  # A class of all images says nothing.
    return replace(source, labels=known[0], classes=known[1])


def _label_violations(
    source: Source, paths: Sequence[Path], tables: Sequence[_Table], labels: Sequence[int | str | None]
) -> Iterator[str]:
    """Yield the sentence that says why the labels cannot be used, if they cannot."""
    classes = tables[0].classes
    numbers = [label if isinstance(label, int) else -1 for label in labels]
    other = next((index for index, table in enumerate(tables) if table.classes != classes), None)
    if other is not None:
        yield f"{paths[other].name} and {paths[0].name} name different classes, so that no image has one"
    elif None in labels:
        yield unlabelled_warning(source.names, labels)
    elif classes and not 0 <= min(numbers) <= max(numbers) < len(classes):
        wrong = next(index for index, number in enumerate(numbers) if not 0 <= number < len(classes))
        yield (
            f"{source.names[wrong]} has the label {labels[wrong]!r}, which is none of the {len(classes)} classes in "
            "the metadata, so that no image has a class"
        )


KIND = ParquetKind()
