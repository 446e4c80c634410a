"""Lists in text files: of images, of their classes, of held-out images."""

from __future__ import annotations

from pathlib import Path

from movq_cli.errors import BadRequestError
from movq_cli.text_encoding import TextEncodingError, decode_text

MAX_TEXT_BYTES = 2**29
"""Largest size of a list in bytes: fifteen million images, as ImageNet-21k has, with 35 bytes each."""

MAX_LINE = 2**14
"""Largest number of characters in a line: a path has at most 4,096 bytes."""


def read_lines(path: Path, content: str) -> list[str]:
    """Read the lines of a list. Bytes that are not UTF-8 stay what they are, because names of files may have them.

    Args:
        path: Path of the file.
        content: Noun for the file in error messages, "list" or "labels".

    Raises:
        BadRequestError: The file cannot be read, or it is too large for a list, or a line is.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise BadRequestError(f"{path} has more than {MAX_TEXT_BYTES} bytes, the limit of a list")
        lines = decode_text(data, is_list_of_files=True).splitlines()
    except (OSError, TextEncodingError) as error:
        raise BadRequestError(f"cannot read the {content} {path}: {_reason(error)}") from None
    if max(map(len, lines), default=0) > MAX_LINE:
        number = 1 + next(index for index, line in enumerate(lines) if len(line) > MAX_LINE)
        raise BadRequestError(f"{path} is no list: line {number} has more than {MAX_LINE} characters")
    return lines


def _reason(error: OSError | TextEncodingError) -> str:
    return str(error.strerror) if isinstance(error, OSError) else str(error)
