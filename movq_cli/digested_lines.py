"""Digests of lines: a file of JSON lines that grows, so that no digest of the whole file can stand in it.

Each line is a JSON object with a field `digest`, the hash (see `movq_cli.digests`) of the object without this field, as
JSON with sorted keys. A line without the field is not checked: older versions wrote none, and a bit that changes the
name of the field leaves the other fields as they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from movq_cli import digests

_FIELD = "digest"


def with_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record, which JSON can represent, with its digest as the last field."""
    return {**record, _FIELD: _digest(json.loads(json.dumps(record)))}


def encode(record: Mapping[str, Any]) -> bytes:
    """Return the line of a record with its digest and the end of line."""
    return json.dumps(with_digest(record)).encode() + b"\n"


def verified(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record that was read, without its digest.

    Raises:
        ValueError: It does not fit its digest.
    """
    content = {name: value for name, value in record.items() if name != _FIELD}
    if _FIELD in record and record[_FIELD] != _digest(content):
        raise ValueError("a line does not fit its digest")
    return content


def decode(line: bytes) -> dict[str, Any]:
    """Return the record of a line, without its digest.

    Raises:
        ValueError: The line is not a JSON object, or does not fit its digest.
    """
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("a line has too many levels") from None
    if not isinstance(record, dict):
        raise ValueError("a line is not a JSON object")
    return verified(record)


def damaged(data: bytes) -> list[int]:
    """Return the numbers, from 1, of the damaged lines of a file; a half line at its end is that of a kill."""
    numbers = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            decode(line)
        except ValueError:
            numbers.append(number)
    return numbers


def _digest(content: Any) -> str:  # noqa: ANN401 - any JSON value
    return digests.of_bytes(json.dumps(content, sort_keys=True).encode())
