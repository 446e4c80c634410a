"""Arrays in .npy and .npz files of any origin: their headers are checked against their bytes before memory is taken."""

from __future__ import annotations

import io
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from movq_cli.errors import BadRequestError

UNREADABLE_ZIP = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""The exceptions that reading a missing, damaged, encrypted or exotic zip archive raises."""

_PREFIX = b"\x93NUMPY"
_LONGEST_HEADER = 10_000
"""Largest length of a header in bytes, which is numpy's own limit."""

_BLOCK = 2**20
_SMALL_BLOCK = 2**6
"""Size of the pieces in which bzip2 and LZMA are read, bytes: zipfile inflates a piece of them without a limit."""


class ArrayHeader(NamedTuple):
    """The header of an array in an .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    is_fortran_order: bool
    start: int  # offset of the values in the file, bytes

    @property
    def size(self) -> int:
        """Size of the values, bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"[:200]  # a structured type can have thousands of fields


def read_header(file: IO[bytes], file_size: int) -> ArrayHeader:
    """Read the header at the start of an .npy file, and check it against the size of the file.

    Args:
        file: The file, at its start; afterwards it is at the first value.
        file_size: Size of the file, bytes.

    Raises:
        ValueError: The file has no header, its array holds Python objects, or it is too short for its array.
    """
    start = file.read(len(_PREFIX) + 2)
    version = tuple(start[len(_PREFIX) :])
    if not start.startswith(_PREFIX) or version not in {(1, 0), (2, 0), (3, 0)}:
        raise ValueError("it is not in numpy's format")
    length_bytes = file.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(length_bytes, "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header has {length} bytes, which is more than {_LONGEST_HEADER}")
    text = file.read(length)
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, is_fortran_order, dtype = parse(io.BytesIO(length_bytes + text))
    except Exception:  # the text is parsed as Python, which raises nearly every type of exception
        raise ValueError("its header is damaged") from None
    header = ArrayHeader(tuple(shape), dtype, is_fortran_order, len(start) + len(length_bytes) + len(text))
    if dtype.hasobject or not dtype.itemsize or any(side < 0 for side in header.shape):
        raise ValueError(f"it holds {header}, which is not an array of numbers")
    available = file_size - header.start
    if header.size > available:
        raise ValueError(f"its header promises {header}, {header.size} bytes, but {available} bytes follow")
    return header


def is_integer(values: NDArray[Any]) -> TypeGuard[NDArray[np.integer[Any]]]:
    """Return whether an array holds integers."""
    return np.issubdtype(values.dtype, np.integer)


def load_array(path: Path) -> NDArray[np.generic]:
    """Read the array of an .npy file.

    Raises:
        BadRequestError: The file cannot be read, or it does not hold an array of numbers.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        with path.open("rb") as file:
            header = read_header(file, os.fstat(file.fileno()).st_size)
            values = np.fromfile(file, header.dtype, math.prod(header.shape))
        return values.reshape(header.shape, order="F" if header.is_fortran_order else "C")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadRequestError(f"{path} is not an .npy file with an array of numbers: {reason}") from None


def member_header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    """Read the header of an array in an .npz file.

    Args:
        archive: The file.
        name: Name of the array.

    Raises:
        KeyError: There is no such array.
        ValueError: As for `read_header`.
        Exception: Any other of `UNREADABLE_ZIP`.
    """
    info = archive.getinfo(f"{name}.npy")
    with _open_member(archive, info) as file:
        return read_header(file, member_size(archive, info))


def load_member(archive: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
    """Read an array in an .npz file, whose header has been read and found small enough.

    Args:
        archive: The file.
        name: Name of the array.

    Raises:
        Exception: Any of `UNREADABLE_ZIP`.
    """
    header = member_header(archive, name)
    data = b"".join(member_blocks(archive, archive.getinfo(f"{name}.npy")))
    if len(data) < header.start + header.size:
        raise EOFError(f"the array {name} is truncated")
    values = np.frombuffer(data, header.dtype, math.prod(header.shape), header.start)
    return values.reshape(header.shape, order="F" if header.is_fortran_order else "C")


def member_blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield the content of a member in blocks, at most as many bytes as its archive declares; its checksum is verified.

    `ZipFile.read` inflates gigabytes at once for a member that declares a few bytes.
    """
    with _open_member(archive, info) as file:
        while block := file.read(_BLOCK if _has_limit(info) else _SMALL_BLOCK):
            yield block


def _open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    file = archive.open(info)
    if not _has_limit(info) and isinstance(file, zipfile.ZipExtFile):
        file.MIN_READ_SIZE = _SMALL_BLOCK
    return file


def _has_limit(info: zipfile.ZipInfo) -> bool:
    """Return whether zipfile inflates no more bytes than are requested."""
    return info.compress_type in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


def member_size(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Return the size of a member after decompression as its archive declares it.

    Args:
        archive: The archive.
        info: The member.

    Raises:
        ValueError: The archive has fewer bytes than the member should have in it.
    """
    assert archive.fp is not None
    archive_size = archive.fp.seek(0, os.SEEK_END)
    stored = info.file_size if info.compress_type == zipfile.ZIP_STORED else info.compress_size
    if info.header_offset + max(stored, info.compress_size) > archive_size:
        raise ValueError(f"its member {info.filename!r} should have {stored} bytes, but the file is shorter")
    return info.file_size


def reason_of(error: BaseException) -> str:
    """Return the text of an exception of `UNREADABLE_ZIP`, or its name if it has no text."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
