"""Small files for the tests of sources."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from movq_cli.data.images import encode_png


def picture(value: int, side: int = 9) -> bytes:
    """Return a PNG file of one grey value."""
    return encode_png(Image.fromarray(np.full((side, side, 3), value % 256, np.uint8)))


def fill(root: Path, *names: str) -> Path:
    """Write a different image under each name in a folder, and return the folder."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(value))
    return root


def tarred(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a tar with some files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a zip file with some files."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def written(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write some files into a folder, and return the folder."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root
