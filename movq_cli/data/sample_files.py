"""Files of samples: a folder of PNGs, or one .zip or .npz file that is packed from such a folder at the end.

While samples are drawn, each image is a file of its own. So a killed run can be resumed in every form and with any
number of processes, and draws only the missing images.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Set
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import TypedDict  # Pydantic needs this one before Python 3.12.

from movq_cli import digests
from movq_cli.console import Console, Progress
from movq_cli.cores import allowed_cores
from movq_cli.data import png
from movq_cli.data.images import BadImageError, decode, encode_png
from movq_cli.data.prefetch import map_ahead
from movq_cli.digests import Header
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import atomic_file, atomic_write, locked

MANIFEST = "manifest.json"

_FILE_SUFFIXES = (".zip", ".npz")

FOLDER_REMEDY = "Run `movq sample` again with the same options: it draws the missing and damaged images."
"""Sentence for errors: which command draws the damaged images in a folder of samples again."""

_DECODERS = min(8, allowed_cores())


SampleImage = TypedDict("SampleImage", {"file": str, "seed": int, "class": str | None})
"""An image in the manifest of a set of samples."""


class SampleManifest(Header):
    """Description of a set of samples, from which each image can be drawn again."""

    max_bytes: ClassVar[int] = 2**30
    """Size that is read at most: some ten million images."""

    settings: dict[str, Any]
    """Everything that decides the images, except their seeds and classes."""
    made_with: dict[str, str]
    """Versions of the software and type of the device. They may change when a set is resumed."""
    images: list[SampleImage]
    """File, seed and class of each image."""

    def text_of(self, index: int) -> str:
        """Return the text in the PNG file of an image, by which it is recognized: its seed, class and settings."""
        image = self.images[index]
        return json.dumps({"seed": image["seed"], "class": image["class"], "settings": self._settings_digest})

    @cached_property
    def _settings_digest(self) -> str:
        # Without the seed of the set: the image of a seed is the same in every set.
        settings = {name: value for name, value in self.settings.items() if name != "seed"}
        return digests.of_bytes(json.dumps(settings, sort_keys=True).encode())


def image_name(index: int) -> str:
    """Return the name of the file of an image.

    Args:
        index: Index of the image in the set.
    """
    return f"{index:06d}.png"


def damaged_samples(folder: Path, console: Console) -> list[str]:
    """Check all images in a folder of samples.

    Args:
        folder: Folder with a manifest of `movq sample`.
        console: Console that shows the progress.

    Returns:
        The names of the images of the manifest that are missing or damaged.

    Raises:
        BadRequestError: The manifest is damaged.
    """
    remedy = f"Remove {folder}, and run `movq sample` again: it draws the images anew."
    manifest = digests.read_header(folder / MANIFEST, SampleManifest, remedy)
    missing = SampleFiles(folder, manifest).missing(_file_names(folder), console)
    return [manifest.images[index]["file"] for index in missing]


def file_remedy(path: Path) -> str:
    """Return the sentence that says what makes a set of samples again that is a file, or its manifest."""
    return f"Remove {path}, and run `movq sample` again: it draws the images anew."


def manifest_of_file(path: Path) -> Path:
    """Return the path of the manifest beside a set of samples that is a file."""
    return path.with_name(f"{path.name}.{MANIFEST}")


class SampleFiles:
    """A set of samples on disk.

    Args:
        path: Path of the set: a folder, or a file with the suffix .zip or .npz.
        manifest: Description of the images that the set shall hold.
    """

    def __init__(self, path: Path, manifest: SampleManifest) -> None:
        self.path = path
        self.manifest = manifest
        suffix = path.suffix.lower()
        self._suffix = suffix if suffix in _FILE_SUFFIXES else None  # None = the set is a folder
        self.listed = len(manifest.images)
        """Number of images of the set after `begin`: in a folder, those of an earlier, larger request stay."""
        self._hint = f"Name another {'folder' if self._suffix is None else 'file'}, or remove this one."

    @property
    def folder(self) -> Path:
        """Folder of the PNGs: the set itself, or a folder beside the file, which exists until the file is complete."""
        return self.path if self._suffix is None else self.path.with_name(f"{self.path.name}.images")

    def is_finished(self) -> bool:
        """Return whether the set is a file that exists. A folder is never finished, because it may be extended.

        Raises:
            BadRequestError: The file has other settings, or `movq sample` did not make it.
        """
        if self._suffix is None or not self.path.exists():
            return False
        if self.path.is_dir():
            raise BadRequestError(f"{self.path} is a folder", "Name a file, or leave its suffix out.")
        if not self._file_manifest.is_file():
            raise BadRequestError(f"{self.path} is a file that `movq sample` did not make", self._hint)
        found, requested = self._check_same(self.path, self._file_manifest), len(self.manifest.images)
        if found != requested:
            raise BadRequestError(f"{self.path} holds {found} images, not {requested}", self._hint)
        digests.check(self.path, file_remedy(self.path))
        self._clear()
        return True

    def locked(self) -> AbstractContextManager[None]:
        """Return a context in which no other command writes to the folder of the PNGs; the folder is created.

        The process that enters it may share the work with other ranks.

        Raises:
            BadRequestError: Another command is writing to the folder, or it is a file.
            FailureError: The folder cannot be created.
        """
        return locked(self.folder, "movq sample")

    def begin(self, console: Console) -> list[int]:
        """Write the manifest, by which a later run recognizes the set, and return the indices of the missing images.

        An image whose file is damaged, or is not the image that the manifest describes, is missing too.

        Args:
            console: Console that shows the progress.

        Raises:
            BadRequestError: The folder holds samples of other settings, or files that `movq sample` did not make.
        """
        existing = _file_names(self.folder)
        found = 0
        if MANIFEST in existing:
            found = self._check_same(self.folder, self.folder / MANIFEST)
        elif any(map(self._is_foreign, existing)):
            raise BadRequestError(f"{self.folder} holds files that `movq sample` did not make", self._hint)
        requested = len(self.manifest.images)
        if found <= requested:
            digests.write_header(self.folder / MANIFEST, self.manifest)
        elif self._suffix is None:
            self.listed = found
            console.warn(
                f"{self.folder} is a set of {found} images, and {requested} were requested; the others stay. Name "
                "another folder for a set of the requested images alone."
            )
        return self.missing(existing, console)

    def missing(self, existing: Set[str], console: Console) -> list[int]:
        """Return the indices of the images whose files are missing, damaged, or not those of the manifest.

        Args:
            existing: Names of the files in the folder.
            console: Console that shows the progress.
        """
        present = [index for index, image in enumerate(self.manifest.images) if image["file"] in existing]
        if not present:
            return list(range(len(self.manifest.images)))
        intact: set[int] = set()
        with console.progress(len(present), "checking", "images") as progress:
            checked = map_ahead(self._is_intact, present, threads=_DECODERS, ahead=4 * _DECODERS)
            for index, is_intact in zip(present, checked, strict=True):
                if is_intact:
                    intact.add(index)
                progress.advance()
        return [index for index in range(len(self.manifest.images)) if index not in intact]

    def write_image(self, index: int, image: Image.Image) -> None:
        """Write the PNG file of an image.

        Args:
            index: Index of the image in the set.
            image: The image.

        Raises:
            FailureError: The file could not be written.
        """
        path = self.folder / self.manifest.images[index]["file"]
        atomic_write(path, encode_png(image, text=self.manifest.text_of(index)))

    def finish(self, labels: list[int], console: Console) -> None:
        """Pack the images, none of which is missing, if the set is a file; then remove their folder.

        Args:
            labels: Label of each image, for an .npz file; empty if the images have no classes.
            console: Console that shows the progress.

        Raises:
            FailureError: An image cannot be read, or the file cannot be written.
        """
        if self._suffix is None:
            return
        images = [self.folder / image["file"] for image in self.manifest.images]
        digests.write_header(self._file_manifest, self.manifest)
        with atomic_file(self.path) as file, console.progress(len(images), "packing", "images") as progress:
            with zipfile.ZipFile(file, "w") as archive:
                if self._suffix == ".zip":
                    archive.writestr(_member(MANIFEST), digests.encode_header(self.manifest))
                    _pack_files(archive, images, progress)
                else:
                    _pack_array(archive, images, progress)
                    if labels:
                        with archive.open(_member("arr_1.npy"), "w") as member:
                            np.lib.format.write_array(member, np.array(labels, dtype=np.int64))
            digests.append_to_zip(file)
        self._clear()

    @property
    def _file_manifest(self) -> Path:
        return manifest_of_file(self.path)

    def _is_foreign(self, name: str) -> bool:
        """Return whether a file in a folder without a manifest could be overwritten, or removed with the folder."""
        return name.endswith(".png") or (self._suffix is not None and name != f"{MANIFEST}.partial")

    def _clear(self) -> None:
        """Remove the folder of the PNGs after packing."""
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            return
        for path in self.folder.iterdir():
            if path != manifest:
                path.unlink(missing_ok=True)
        # It goes last: by it, a command after a killed one knows that the folder is its own.
        manifest.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _check_same(self, path: Path, manifest: Path) -> int:
        """Refuse an earlier set with other settings or classes, and return its number of images."""
        earlier, ours = digests.read_header(manifest, SampleManifest, self._hint), self.manifest
        if earlier.settings != ours.settings:
            names = {**ours.settings, **earlier.settings}
            changed = [name for name in names if earlier.settings.get(name) != ours.settings.get(name)]
            raise BadRequestError(f"{path} holds samples of other settings ({', '.join(changed)})", self._hint)
        shared = min(len(earlier.images), len(ours.images))
        if earlier.images[:shared] != ours.images[:shared]:
            raise BadRequestError(f"{path} holds samples of other classes", self._hint)
        return len(earlier.images)

    def _is_intact(self, index: int) -> bool:
        """Return whether the file of an image is undamaged and the one that the manifest describes."""
        path = self.folder / self.manifest.images[index]["file"]
        try:
            return png.read_text(path.read_bytes()) == self.manifest.text_of(index)
        except (OSError, BadImageError):
            return False


def _file_names(folder: Path) -> set[str]:
    return set(os.listdir(folder))  # noqa: PTH208 - only names, which is fast for very many files


def _member(name: str) -> zipfile.ZipInfo:
    """Return the entry of an uncompressed member without a time, so that the same images give the same file."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o644 << 16
    return info


def _pack_files(archive: zipfile.ZipFile, images: list[Path], progress: Progress) -> None:
    for path in images:
        archive.writestr(_member(path.name), _read(path))
        progress.advance()


def _pack_array(archive: zipfile.ZipFile, images: list[Path], progress: Progress) -> None:
    """Write the images as `arr_0`, uint8 [N, H, W, 3], one at a time: together they may be larger than memory."""
    with archive.open(_member("arr_0.npy"), "w", force_zip64=True) as member:
        decoded = map_ahead(_decode, images, threads=_DECODERS, ahead=4 * _DECODERS)
        for index, pixels in enumerate(decoded):
            if index == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *pixels.shape)}
                np.lib.format.write_array_header_1_0(member, header)
            member.write(pixels.tobytes())
            progress.advance()


def _decode(path: Path) -> NDArray[np.uint8]:
    try:
        return np.asarray(decode(_read(path)))
    except BadImageError as error:
        raise _unreadable(path, str(error)) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}") from None


def _unreadable(path: Path, reason: str) -> FailureError:
    return FailureError(f"{path}: {reason}", "Remove it and run the same command again to draw it again.")
