"""Digests: a file that movq writes and reads again carries a hash of its content, which is checked when it is read.

The hash is XXH3 with 128 bits, which is as fast as memory. It finds damage, but it is no protection against somebody
who changes the digest as well. It stands in the file itself, as `xxh3-128:` and 32 hexadecimal digits, so that file and
digest are always written together. It is the hash of the file in which these 32 digits are zeros. Its position depends
on the format:

    JSON, safetensors       a field at the beginning of the file (of the header)
    zip, npz, checkpoint    the comment of the zip file, at its end
    npy of code maps        behind the array, at the end of the file

Lines of a file that grows have a digest each: movq_cli/digested_lines.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, ClassVar, TypeVar

import xxhash
from pydantic import ValidationError

from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_file, atomic_write
from movq_cli.setting_types import Settings

HeaderT = TypeVar("HeaderT", bound="Header")

_MARK = b"xxh3-128:"
_DIGITS = 32
_LENGTH = len(_MARK) + _DIGITS
_ZEROS = b"0" * _DIGITS

NO_DIGEST = (_MARK + _ZEROS).decode()
"""The text that `write` and `append_to_zip` replace by the digest."""

_HEAD_BYTES = 2**16  # bytes at the beginning of a file among which a digest is looked for
_BLOCK_BYTES = 2**22  # bytes that are read at once
_ZIP_END = b"PK\x05\x06"  # signature of the last record of a zip file, which has 22 bytes without a comment
_ZIP_END_BYTES = 22


class Header(Settings):
    """The content of a JSON file that carries its digest."""

    max_bytes: ClassVar[int] = 2**26
    """Size of a file that is read at most; it is far above that of every file that movq writes."""

    digest: str = NO_DIGEST
    """Hash of the file, `xxh3-128:` and 32 hexadecimal digits, computed with zeros in place of these digits."""


def write_header(path: Path, header: Header, *, concurrent: bool = False) -> None:
    """Write a header as a JSON file with its digest.

    Args:
        path: File to create or replace.
        header: Content of the file; the value of its `digest` does not matter.
        concurrent: Whether several processes may write the file at once, as for `files.atomic_file`.

    Raises:
        FailureError: The file could not be written.
    """
    atomic_write(path, encode_header(header), concurrent=concurrent)


def encode_header(header: Header) -> bytes:
    """Return the content of the JSON file of a header, with its digest; the value of its `digest` does not matter."""
    text = header.model_copy(update={"digest": NO_DIGEST}).model_dump_json(indent=2)
    return with_digest(text.encode() + b"\n")


def with_digest(data: bytes) -> bytes:
    """Return the content of a file with its digest in place of the first `NO_DIGEST`."""
    return data.replace(NO_DIGEST.encode(), of_bytes(data).encode(), 1)


def read_header(path: Path, kind: type[HeaderT], remedy: str) -> HeaderT:
    """Read a header from a JSON file and check its digest.

    Args:
        path: The file.
        kind: Class of the header.
        remedy: Sentence for the error that says what makes the file again.

    Returns:
        The header, whose `digest` is `NO_DIGEST` again.

    Raises:
        FileNotFoundError: The file does not exist.
        NotADirectoryError: A parent folder of the file does not exist.
        BadRequestError: The file is damaged or cannot be read, or another version of movq wrote it.
    """
    data, has_digest = read_json(path, remedy, kind.max_bytes)
    try:
        header = kind.model_validate_json(data)
    except ValidationError as error:
        if has_digest:  # The file is intact, so that another version must have written it.
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            message = f"{path} was written by another version of movq ({name}: {first['msg']})"
            raise BadRequestError(message, remedy) from None
        raise BadRequestError(f"{path} is damaged, or movq did not write it", remedy) from None
    if not has_digest and header.digest != NO_DIGEST:
        raise BadRequestError(f"{path} is damaged: its digest cannot be read", remedy)
    return header.model_copy(update={"digest": NO_DIGEST})


def read_json(path: Path, remedy: str, max_bytes: int = Header.max_bytes) -> tuple[bytes, bool]:
    """Return the content of a JSON file, and whether it carries a digest, which is then checked.

    Args:
        path: The file.
        remedy: Sentence for the error that says what makes the file again.
        max_bytes: Size of a file that is read at most.

    Raises:
        FileNotFoundError: The file does not exist.
        NotADirectoryError: A parent folder of the file does not exist.
        BadRequestError: The file is damaged, too large, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            # Python takes the memory for the requested number of bytes at once.
            data = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
        if len(data) > max_bytes:
            raise BadRequestError(f"{path} is damaged, or movq did not write it: it has over {max_bytes} bytes", remedy)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise _unreadable(path, error, remedy) from None
    position = data.find(_MARK) + len(_MARK)
    if position < len(_MARK):
        return data, False
    hasher = xxhash.xxh3_128()
    _update(hasher, data, 0, position)
    if data[position : position + _DIGITS] != hasher.hexdigest().encode():
        raise _damaged(path, remedy)
    return data, True


def of_file(path: Path) -> str:
    """Return the digest of a complete file, for a file that cannot carry its own digest.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return _MARK.decode() + _hash(file, None)


def of_bytes(data: bytes) -> str:
    """Return the digest of bytes."""
    return _MARK.decode() + xxhash.xxh3_128_hexdigest(data)


def write(path: Path, data: bytes) -> None:
    """Write a file with its digest in place of the first `NO_DIGEST`, without a copy of its content in memory.

    Args:
        path: File to create or replace.
        data: Content of the file, which contains `NO_DIGEST`.

    Raises:
        FailureError: The file could not be written.
    """
    position = data.index(NO_DIGEST.encode()) + len(_MARK)
    with atomic_file(path) as file:
        file.write(data)
        file.seek(position)
        file.write(xxhash.xxh3_128_hexdigest(data).encode())


def append_to_zip(file: BinaryIO) -> None:
    """Add the digest of a zip file as its comment.

    Args:
        file: The complete zip file without a comment, open for reading and writing.
    """
    end = file.seek(-_ZIP_END_BYTES, os.SEEK_END) + _ZIP_END_BYTES
    record = file.read(_ZIP_END_BYTES)
    assert record[:4] == _ZIP_END, "the zip file has a comment already"
    file.seek(end - 2)
    file.write(struct.pack("<H", _LENGTH) + NO_DIGEST.encode())
    file.flush()
    digest = _hash(file, None).encode()
    file.seek(end + len(_MARK))
    file.write(digest)


def check(path: Path, remedy: str, *, required: bool = True) -> bool:
    """Check the digest that a zip file, a checkpoint or a safetensors file carries.

    Args:
        path: The file.
        remedy: Sentence for the error that says what makes the file again.
        required: Whether a file without a digest is refused; otherwise another program may have written it.

    Returns:
        Whether the file carries a digest.

    Raises:
        BadRequestError: The file is missing, cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as file:
            position = _find(file)
            if position is None:
                if required:
                    raise BadRequestError(f"{path} is damaged or not a file of movq: it has no digest", remedy)
                return False
            file.seek(position)
            stored = file.read(_DIGITS)
            if _hash(file, position).encode() != stored:
                raise _damaged(path, remedy)
    except OSError as error:
        raise _unreadable(path, error, remedy) from None
    return True


def check_file(path: Path, digest: str, remedy: str) -> None:
    """Check a file whose digest is stored elsewhere, as `of_file` returned it.

    Raises:
        BadRequestError: The file is missing, cannot be read, or is damaged.
    """
    try:
        found = of_file(path)
    except OSError as error:
        raise _unreadable(path, error, remedy) from None
    if found != digest:
        raise _damaged(path, remedy)


def of_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the digests of complete files in a folder, by their names, for the header of the folder.

    Raises:
        OSError: A file cannot be read.
    """
    return {name: of_file(folder / name) for name in names}


def check_files(folder: Path, names: Iterable[str], stored: Mapping[str, str], remedy: str) -> None:
    """Check files whose digests are stored in the header of their folder, as `of_files` returned them.

    Raises:
        BadRequestError: A file is missing, damaged, or has no digest.
    """
    for name in names:
        if name not in stored:
            raise BadRequestError(f"{folder} was made by an older version of movq: {name} has no digest", remedy)
        check_file(folder / name, stored[name], remedy)


def stored_in(path: Path) -> str | None:
    """Return the digest that a file carries without checking it; None if it carries none.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        position = _find(file)
        if position is None:
            return None
        file.seek(position)
        return (_MARK + file.read(_DIGITS)).decode()


def _damaged(path: Path, remedy: str) -> BadRequestError:
    return BadRequestError(f"{path} is damaged: its content does not fit its digest", remedy)


def _unreadable(path: Path, error: OSError, remedy: str) -> BadRequestError:
    return BadRequestError(f"{path} cannot be read: {error.strerror}", remedy)


def _find(file: BinaryIO) -> int | None:
    """Return the offset of the digest's digits, or None if the file carries no digest."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - _LENGTH)
    file.seek(start)
    if (tail := file.read(_LENGTH)).startswith(_MARK) and _is_hexadecimal(tail[len(_MARK) :]):
        return start + len(_MARK)
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    if head.startswith(b"PK"):  # A member of the zip file may carry a digest of its own.
        return None
    position = head.find(_MARK) + len(_MARK)
    return position if position >= len(_MARK) and _is_hexadecimal(head[position : position + _DIGITS]) else None


def _is_hexadecimal(digits: bytes) -> bool:
    return len(digits) == _DIGITS and not digits.strip(b"0123456789abcdef")


def _hash(file: BinaryIO, position: int | None) -> str:
    """Return the hash of a file, with zeros in place of the digits at an offset; None = nothing is replaced."""
    hasher = xxhash.xxh3_128()
    block = bytearray(_BLOCK_BYTES)
    offset = file.seek(0)
    while length := file.readinto(block):  # type: ignore[attr-defined]
        _update(hasher, memoryview(block)[:length], offset, position)
        offset += length
    return hasher.hexdigest()


def _update(hasher: xxhash.xxh3_128, data: bytes | memoryview, offset: int, position: int | None) -> None:
    """Hash the bytes of a file from an offset on, with zeros in place of the digits at `position`."""
    view = memoryview(data)
    if position is not None:
        start, stop = (min(max(edge - offset, 0), len(view)) for edge in (position, position + _DIGITS))
        hasher.update(view[:start])
        hasher.update(_ZEROS[: stop - start])
        view = view[stop:]
    hasher.update(view)
