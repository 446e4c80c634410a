"""Files that a command writes at a path of the user's choice: what they may be called, and what they may replace.

A file that movq did not write is never replaced; one that it wrote is, so that the same command can run again.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from movq_cli.errors import BadRequestError

_START_BYTES = 2**16
"""Number of bytes from the start of a picture or page within which movq's mark is."""

_LARGEST_RESULT = 2**26
"""Size of the largest JSON file that may be a result of movq, bytes."""


@dataclass(frozen=True)
class OutputKind:
    """A kind of file that a command writes."""

    suffixes: tuple[str, ...]
    """Suffixes of its name, in lower case; the first is the usual one."""
    is_ours: Callable[[Path], bool]
    """Function that returns whether movq wrote a file of this kind, which is not empty."""


def require_name(path: Path, option: str, kind: OutputKind) -> None:
    """Refuse a name that says another content than the file will have.

    Args:
        path: The file that will be written.
        option: Name of the option or argument.
        kind: Kind of the file.

    Raises:
        BadRequestError: The suffix is another one.
    """
    if path.suffix.lower() not in kind.suffixes:
        usual = kind.suffixes[0]
        message = f"{option} {path} is not the name of a {usual} file"
        raise BadRequestError(message, f"Example: {option} {path.stem or 'file'}{usual}")


def refuse_foreign(path: Path, kind: OutputKind) -> None:
    """Refuse to replace a file that movq did not write; an empty file may be replaced.

    Args:
        path: The file that will be written.
        kind: Kind of the file.

    Raises:
        BadRequestError: The path is that of such a file, or of a folder.
    """
    if path.is_dir():
        raise BadRequestError(f"{path} is a folder", f"Name a {kind.suffixes[0]} file.")
    try:
        is_replaceable = not path.exists() or (path.is_file() and (path.stat().st_size == 0 or kind.is_ours(path)))
    except OSError:  # Whether it is ours is unknown.
        is_replaceable = False
    if not is_replaceable:
        raise BadRequestError(f"{path} exists, and movq did not write it", "Choose another path, or remove that file.")


def _is_our_picture(path: Path) -> bool:
    from movq_cli.data.images import TEXT_KEYWORD
    from movq_cli.data.png_chunks import SIGNATURE

    start = _start_of(path)
    return start.startswith(SIGNATURE) and f"tEXt{TEXT_KEYWORD}\0".encode() in start


def _is_our_page(path: Path) -> bool:
    return b"movq report</title>" in _start_of(path)


def _is_our_result(path: Path) -> bool:
    """Return whether a file has one result of `movq evaluate`, or several of them by their files."""
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= _LARGEST_RESULT else None
    except (ValueError, RecursionError):
        return False
    if not isinstance(content, dict):
        return False
    results = [content] if "protocol" in content else list(content.values())
    return all(isinstance(result, dict) and isinstance(result.get("protocol"), dict) for result in results)


def _are_our_statistics(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy", "protocol.npy"} <= set(archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_START_BYTES)


PICTURE = OutputKind((".png",), _is_our_picture)
PAGE = OutputKind((".html", ".htm"), _is_our_page)
RESULT = OutputKind((".json",), _is_our_result)
STATISTICS = OutputKind((".npz",), _are_our_statistics)
