"""Tables beside images that say what the images show: the `metadata` files of Hugging Face's imagefolder layout.

A table has a column with the path of an image, relative to the folder of the table, and further columns; those of
captions and of boxes are tables of this form too. Only the column `label` gives classes.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from movq_cli.data.array_files import reason_of
from movq_cli.data.images import BadImageError
from movq_cli.sources.arrays import MAX_IMAGES
from movq_cli.sources.beside import normal_name, read_text
from movq_cli.sources.parquet_rows import first_line
from movq_cli.sources.source import UNREADABLE, Reader

TABLES = frozenset(["metadata.csv", "metadata.jsonl", "metadata.parquet"])
"""Names of the tables, as the `datasets` library of Hugging Face reads them."""

_FILE_NAME, _LABEL = "file_name", "label"
_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")
_NAMED = 40
"""Number of characters of a label or of the names of columns that a sentence has."""

Row = tuple[Any, Any]
"""Path of an image and its label, as they are in a table."""

Table = tuple[list[str], Iterable[Mapping[str, Any]]]
"""The names of the columns, and the rows by them."""


class TableLabels(NamedTuple):
    """The labels that the tables beside images give."""

    values: tuple[int | str | None, ...]  # label of each image; None = the tables give it none
    used: frozenset[str]  # names of the tables that have labels
    faults: tuple[str, ...]  # sentences that say why the labels cannot be used
    warnings: tuple[str, ...]  # sentences about what the tables give no class for


class _TableError(ValueError):
    """A table cannot be used; the message is the rest of a sentence about it."""


def table_labels(names: Sequence[str], others: Mapping[str, int], reader: Reader) -> TableLabels:
    """Return the labels that tables give to images.

    Args:
        names: Names of the images.
        others: Member numbers of the files that are no images, by their names.
        reader: Access to the files.
    """
    images = {normal_name(name): name for name in names}
    values: dict[str, int | str | None] = {}
    used: list[str] = []
    faults: list[str] = []
    warnings: list[str] = []
    without: dict[str, list[str]] = {}  # tables that give no classes, by the reason
    for table in sorted(file for file in others if PurePosixPath(file).name in TABLES):
        try:
            rows = _read_rows(table, reader, others[table])
        except _TableError as error:
            without.setdefault(str(error), []).append(table)
            continue
        if all(label is None for _, label in rows):
            continue
        used.append(table)
        try:
            unknown = _add_rows(table, rows, images, values)
        except _TableError as error:
            faults.append(str(error))
            continue
        if unknown:
            warnings.append(
                f"{len(unknown)} rows of {table} name no image of the source, such as {unknown[0]!r}. Correct or "
                "remove them; a name is relative to the folder of the table"
            )
    for reason, tables in without.items():
        more = f" (and {len(tables) - 1} others)" if len(tables) > 1 else ""
        warnings.append(f"{tables[0]}{more} {reason}")
    return TableLabels(tuple(values.get(name) for name in names), frozenset(used), tuple(faults), tuple(warnings))


def _add_rows(
    table: str, rows: Iterable[Row], images: Mapping[str, str], values: dict[str, int | str | None]
) -> list[str]:
    """Add the labels of a table to those of other tables, and return its file names that are those of no image.

    Args:
        table: Name of the table.
        rows: Rows of the table.
        images: Names of the images by their normal names.
        values: Labels by the images' names, to which those of the table are added.

    Raises:
        _TableError: An image has two different labels.
    """
    folder = posixpath.dirname(table)
    unknown: list[str] = []
    for file, label in rows:
        path = posixpath.normpath(posixpath.join(folder, str(file).replace("\\", "/")))
        name = images.get(normal_name(path))
        if name is None:
            unknown.append(str(file))
        elif values.setdefault(name, label) != label:
            raise _TableError(
                f"{table} gives {name} the label {label!r}, and another row gives it {values[name]!r}, so that no "
                "image has a class. Correct it, or pass --no-labels"
            )
    return unknown


def _read_rows(table: str, reader: Reader, member: int) -> list[Row]:
    """Return the rows of a table; none of them if it is a table of something else.

    Raises:
        _TableError: It gives no classes, because it cannot be read, or has either labels or file names, but not both.
    """
    suffix = PurePosixPath(table).suffix
    if suffix == ".parquet":
        columns, rows = _parquet_table(reader, member)
    else:
        text = read_text(reader, member)
        if not text:
            raise _TableError("is empty or cannot be read as UTF-8, so that it gives no classes")
        columns, rows = _csv_table(text) if suffix == ".csv" else _jsonl_table(text)
    file_column = _file_column(columns)
    if file_column is None and _LABEL not in columns:
        return []
    if file_column is None or _LABEL not in columns:
        missing, content = (_FILE_NAME, "paths") if file_column is None else (_LABEL, "classes")
        listed = ", ".join(map(str, columns))
        raise _TableError(
            f"has no column {missing} ({listed if len(listed) <= _NAMED else f'{listed[:_NAMED]}...'}), so that it "
            f"gives no classes. If a column has the {content}, rename it {missing}"
        )
    return [(row.get(file_column), _as_class(row.get(_LABEL))) for row in rows]


def _file_column(columns: Sequence[str]) -> str | None:
    """Return the column of the images' paths: `file_name`, or the only one whose name ends with it."""
    if _FILE_NAME in columns:
        return _FILE_NAME
    others = [name for name in columns if name.endswith(f"_{_FILE_NAME}")]
    return others[0] if len(others) == 1 else None


def _csv_table(text: str) -> Table:
    """Return the content of a CSV file; labels that all are whole numbers become numbers."""
    try:
        lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = list(lines.fieldnames or ())
        rows = [_needed(line) for line in lines]
    except csv.Error as error:
        raise _TableError(f"is no CSV file ({error}), so that it gives no classes") from None
    numbers = {label: _WHOLE_NUMBER.fullmatch(label) for row in rows if (label := row.get(_LABEL))}
    if all(numbers.values()):
        as_number = {label: int(found[1]) for label, found in numbers.items() if found is not None}
        rows = [{**row, _LABEL: as_number.get(row.get(_LABEL))} for row in rows]
    return columns, rows


def _jsonl_table(text: str) -> Table:
    """Return the content of a file with a JSON object in each line."""
    columns: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise _TableError(f"has no JSON object in line {number}, so that it gives no classes. Correct that line")
        columns |= dict.fromkeys(row)
        rows.append(_needed(row))
    return list(columns), rows


def _needed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of a row that may be needed: captions would take much memory."""
    return {name: cell for name, cell in row.items() if name == _LABEL or str(name).endswith(_FILE_NAME)}


def _parquet_table(reader: Reader, member: int) -> Table:
    """Return the content of a parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise _TableError("gives no classes without pyarrow. Run: pip install 'movq[parquet]'") from None
    try:
        with pq.ParquetFile(io.BytesIO(reader.read(member))) as file:
            if file.metadata.num_rows > MAX_IMAGES:
                raise _TableError(f"states {file.metadata.num_rows} rows, more than the {MAX_IMAGES} that are read")
            columns = list(file.schema_arrow.names)
            read = [name for name in (_file_column(columns), _LABEL) if name in columns]
            return columns, file.read(read, use_threads=False).to_pylist()
    except (BadImageError, *UNREADABLE, pyarrow.ArrowException) as error:
        if isinstance(error, _TableError):
            raise
        raise _TableError(f"cannot be read ({first_line(reason_of(error))}), so that it gives no classes") from None


def _as_class(label: object) -> int | str | None:
    """Return the class that a label stands for; None if it is missing, for which the `datasets` library writes -1.

    Raises:
        _TableError: It is neither a number nor a name.
    """
    if label is None or label in ("", -1) or label != label:  # noqa: PLR0124 - a missing number is NaN
        return None
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if not isinstance(label, int | str):
        raise _TableError(
            f"has the label {str(label)[:_NAMED]}, which is neither a number nor a name, so that it gives no classes"
        )
    return int(label) if isinstance(label, int) else label
