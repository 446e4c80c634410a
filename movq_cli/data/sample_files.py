"""Where samples go: a folder of PNGs, or one zip or npz file that is packed from such a folder at the end.

While a set is made each image is a file of its own, so that a killed run makes only what is missing, in every form and
with any number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from movq_cli.console import Console, Progress
from movq_cli.data.images import BadImageError
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import atomic_path, atomic_write, locked
from movq_cli.sources import stream
from movq_cli.sources.folder import FolderReader
from movq_cli.sources.source import Source

MANIFEST = "manifest.json"

_FORMS = (".zip", ".npz")


@dataclass(frozen=True)
class SampleManifest:
    """What a set of samples is, and how to draw each again."""

    settings: dict[str, Any]
    """All that decides the images, but for their seeds and classes."""
    made_with: dict[str, str]
    """Versions and the type of the device: they may differ where a set is gone on with."""
    images: list[dict[str, Any]]
    """File, seed and class of each."""

    def encode(self) -> bytes:
        """As a JSON file."""
        return json.dumps(vars(self), indent=1).encode()


def image_name(index: int) -> str:
    """The file of image i."""
    return f"{index:06d}.png"


class SampleFiles:
    """A set of samples on disk.

    Args:
        path: The set: a folder, or a file ending in .zip or .npz.
        manifest: What it is to hold.
    """

    def __init__(self, path: Path, manifest: SampleManifest) -> None:
        self.path = path
        self.manifest = manifest
        self._form = path.suffix.lower() if path.suffix.lower() in _FORMS else None
        self._hint = f"Name another {'folder' if self._form is None else 'file'}, or remove this one."

    @property
    def folder(self) -> Path:
        """Where the PNGs are written: the set itself, or a folder beside the file that is there until it is whole."""
        return self.path if self._form is None else self.path.with_name(f"{self.path.name}.images")

    def is_finished(self) -> bool:
        """Whether the set is a file, and there. A folder may always be gone on with.

        Raises:
            BadRequestError: The file is of other settings, or something else.
        """
        if self._form is None or not self.path.exists():
            return False
        if self.path.is_dir():
            raise BadRequestError(f"{self.path} is a folder", "Name a file, or leave its suffix out.")
        if not self._beside.is_file():
            raise BadRequestError(f"{self.path} is a file that `movq sample` did not make", self._hint)
        held, wanted = self._check_same(self.path, self._beside), len(self.manifest.images)
        if held != wanted:
            raise BadRequestError(f"{self.path} holds {held} images, not {wanted}", self._hint)
        self._clear()
        return True

    def locked(self) -> AbstractContextManager[None]:
        """The folder of the PNGs for this process, and for those that it shares its work with.

        Raises:
            BadRequestError: Another process is at work in it, or it is a file.
            FailureError: It cannot be made.
        """
        return locked(self.folder, "movq sample")

    def begin(self) -> list[int]:
        """Write the manifest, which says whether another run may go on; the images that are not there yet.

        Raises:
            BadRequestError: The folder holds samples of other settings, or something else.
        """
        there = set(os.listdir(self.folder))  # noqa: PTH208 - names alone, and quickly: there may be many
        held = 0
        if MANIFEST in there:
            held = self._check_same(self.folder, self.folder / MANIFEST)
        elif any(map(self._is_foreign, there)):
            raise BadRequestError(f"{self.folder} holds files that `movq sample` did not make", self._hint)
        if held <= len(self.manifest.images):
            atomic_write(self.folder / MANIFEST, self.manifest.encode())
        return [index for index, image in enumerate(self.manifest.images) if image["file"] not in there]

    def finish(self, labels: list[int], console: Console) -> None:
        """Pack the images, all of which are there, where the set is to be a file, and remove their folder.

        Args:
            labels: Each image's class, for an .npz file; empty = they have none.
            console: For the progress.

        Raises:
            FailureError: The file cannot be written.
        """
        if self._form is None:
            return
        names = tuple(image["file"] for image in self.manifest.images)
        images = Source(str(self.folder), names, tuple(range(len(names))), FolderReader(self.folder, names))
        atomic_write(self._beside, self.manifest.encode())
        with (
            atomic_path(self.path) as partial,
            zipfile.ZipFile(partial, "w") as archive,
            console.progress(len(images), "packing", "images") as progress,
        ):
            if self._form == ".zip":
                archive.writestr(_member(MANIFEST), self.manifest.encode())
                _pack_files(archive, images, progress)
            else:
                _pack_array(archive, images, progress)
                if labels:
                    with archive.open(_member("arr_1.npy"), "w") as member:
                        np.lib.format.write_array(member, np.array(labels, dtype=np.int64))
        self._clear()

    @property
    def _beside(self) -> Path:
        """The manifest of a set that is a file."""
        return self.path.with_name(f"{self.path.name}.{MANIFEST}")

    def _is_foreign(self, name: str) -> bool:
        """Whether a file in a folder without a manifest is in our way, or in the end we would be in its."""
        return name.endswith(".png") or (self._form is not None and name != f"{MANIFEST}.partial")

    def _clear(self) -> None:
        if (self.folder / MANIFEST).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _check_same(self, place: Path, manifest: Path) -> int:
        """How many images an earlier run's manifest gives a place; it must be of the same settings and classes."""
        try:
            before = json.loads(manifest.read_text(encoding="utf-8"))
            settings, images = before["settings"], before["images"]
        except (ValueError, KeyError, TypeError):
            raise BadRequestError(f"{manifest} is not a manifest of `movq sample`", self._hint) from None
        now = self.manifest
        if settings != now.settings:
            changed = [name for name in {**now.settings, **settings} if settings.get(name) != now.settings.get(name)]
            raise BadRequestError(f"{place} holds samples of other settings ({', '.join(changed)})", self._hint)
        shared = min(len(images), len(now.images))
        if images[:shared] != now.images[:shared]:
            raise BadRequestError(f"{place} holds samples of other classes", self._hint)
        return len(images)


def _member(name: str) -> zipfile.ZipInfo:
    """A stored member that bears no time: the same images give the same file."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o644 << 16
    return info


def _pack_files(archive: zipfile.ZipFile, images: Source, progress: Progress) -> None:
    for index, name in enumerate(images.names):
        archive.writestr(_member(name), images.read(index))
        progress.advance()


def _pack_array(archive: zipfile.ZipFile, images: Source, progress: Progress) -> None:
    """Images as `arr_0`, uint8 [N, H, W, 3], an image at a time: together they may be larger than memory."""
    with archive.open(_member("arr_0.npy"), "w", force_zip64=True) as member:
        for index, image in stream.decoded(images, range(len(images))):
            if isinstance(image, BadImageError):
                raise FailureError(
                    f"{images.location}/{images.names[index]}: {image}", "Remove it to have it made again."
                )
            pixels = image.permute(1, 2, 0).numpy()
            if index == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *pixels.shape)}
                np.lib.format.write_array_header_1_0(member, header)
            member.write(pixels.tobytes())
            progress.advance()
