"""Paths as users write them, and what a file system allows in a name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from movq_cli.errors import BadRequestError

LONGEST_NAME = 255
"""Largest number of bytes of the name of a file on the usual file systems."""

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
"""A variable in a path: `$NAME` or `${NAME}`."""


def expand_path(path: Path) -> Path:
    """Return a path with a home folder in place of `~`, and the values of variables in place of `$NAME` and `${NAME}`.

    A shell does this only where it reads a path as a word of its own, not in a file and not after `--option=`. A path
    that exists as it is written stays as it is.

    Raises:
        BadRequestError: A variable is not set, or there is no such user.
    """
    text = str(path)
    if (not text.startswith("~") and "$" not in text) or os.path.lexists(text):
        return path

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise BadRequestError(
                f"the path {text} has the variable {name}, which is not set", "Set it, or write the path without it."
            )
        return os.environ[name]

    expanded = Path(_VARIABLE.sub(value_of, text))
    try:
        return expanded.expanduser() if text.startswith("~") else expanded
    except RuntimeError:
        raise BadRequestError(
            f"the path {text} begins with a user who does not exist", "Write the complete path."
        ) from None


def require_utf8(path: Path) -> None:
    """Refuse a path that weight files, manifests or TensorBoard cannot be opened by, or cannot record.

    Raises:
        BadRequestError: The path is not valid UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BadRequestError(
            f"the path {path} is not valid UTF-8, so that it cannot be recorded in a file",
            "Rename the folder, or name a link to it: ln -s",
        ) from None


def is_too_long(name: str) -> bool:
    """Return whether a part of a relative path has more bytes than a file system allows in a name."""
    return any(len(os.fsencode(part)) > LONGEST_NAME for part in name.split("/"))
