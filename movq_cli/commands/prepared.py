"""`movq prepare --check` and `--show`: verify every byte of a prepared set, and show some of its images."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from movq_cli import digests
from movq_cli.console import Console
from movq_cli.data.images import BadImageError, center_crop, encode_png
from movq_cli.data.output_files import PICTURE, refuse_foreign, require_name
from movq_cli.data.shard_index import INDEX, labels_of, read_index
from movq_cli.data.shard_writer import ShardReport, content_hash, inspect_shard
from movq_cli.data.shards import (
    MANIFEST,
    REJECTS,
    SOURCES,
    SPLITS,
    DatasetManifest,
    PreparedSet,
    Split,
    decode_stored,
    shard_name,
    shard_path,
)
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import atomic_write

_COLUMNS = 8
_ROWS = 10
_TILE = 128  # side of an image on the contact sheet, pixels; smaller images are enlarged by a whole number
_GAP = 2  # pixels between images
_CAPTION = 14  # height of a caption, pixels

# Checking


class _Inspection(NamedTuple):
    """The result of checking a shard."""

    report: ShardReport | None  # content of the shard; None = it cannot be read
    errors: tuple[str, ...]


def check(root: Path, *, workers: int, console: Console) -> None:
    """Verify a prepared set: checksums, pixels, sizes, labels and counts.

    Args:
        root: The set's folder.
        workers: Number of threads.
        console: Console for progress and the result; each error is a warning.

    Raises:
        BadRequestError: The folder holds no finished prepared set.
        FailureError: The set is damaged.
    """
    manifest = DatasetManifest.read(root)
    errors = find_errors(root, manifest, workers=workers, console=console)
    for error in errors:
        console.warn(error)
    if errors:
        raise FailureError(f"the prepared set {root} is damaged: {len(errors)} errors", remedy(root))
    train, held_out = (manifest.counts[split] for split in SPLITS)
    others = {"rejected": manifest.rejects, "classes": len(manifest.classes), "hash": manifest.hash}
    shards = sum(manifest.shards.values())
    text = f"{root}\t{train} train, {held_out} val, {shards} shards: no errors"
    console.result({"path": str(root), "train": train, "val": held_out, **others}, text)


def remedy(root: Path) -> str:
    """Return the sentence that says how the damaged shards of a set are made again."""
    return f"Remove the shards that are named and {root / MANIFEST}, and run the same `movq prepare` again."


def find_errors(root: Path, manifest: DatasetManifest, *, workers: int, console: Console) -> list[str]:
    """Verify a prepared set, and return one sentence for each error; each begins with the path of the file.

    Args:
        root: The set's folder.
        manifest: The set's manifest.
        workers: Number of threads.
        console: Console for progress.
    """
    shards = {
        shard_name(split, number): shard_path(root, split, number)
        for split in SPLITS
        for number in range(manifest.shards[split])
    }
    reports: dict[str, ShardReport] = {}
    errors: list[str] = []
    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        console.progress(len(shards), "checking", "shards") as progress,
    ):
        for name, inspection in zip(shards, pool.map(partial(_inspect, manifest), shards.values()), strict=True):
            if inspection.report is not None:
                reports[name] = inspection.report
            errors += [f"{shards[name]}: {error}" for error in inspection.errors]
            progress.advance()
    if (root / SOURCES).is_file():
        try:
            digests.check(root / SOURCES, "")
        except BadRequestError as error:
            errors.append(f"{root / SOURCES}: {error.message.removeprefix(f'{root / SOURCES} ')}")
    return errors or [f"{root}: {error}" for error in _errors_of_set(root, manifest, reports)]


def _inspect(manifest: DatasetManifest, path: Path) -> _Inspection:
    try:
        with zipfile.ZipFile(path) as archive:
            index = read_index(archive)
            names = [info.filename for info in archive.infolist() if info.filename != INDEX]
            errors = (*_errors_of_index(manifest, index, names), *_errors_of_images(manifest, archive, names))
        try:
            return _Inspection(inspect_shard(path), errors)
        except BadRequestError as error:  # Its digest is wrong, of which the errors of the images are more exact.
            return _Inspection(None, errors or (error.message.removeprefix(f"{path} "),))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return _Inspection(None, (f"cannot be read: {reason}",))


def _errors_of_index(manifest: DatasetManifest, index: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    if list(index["sources"]) != names:
        yield f"{INDEX} names {len(index['sources'])} images, which are not the {len(names)} images of the shard"
    try:
        labels_of(index, names, len(manifest.classes))
    except ValueError as error:
        yield str(error)


def _errors_of_images(manifest: DatasetManifest, archive: zipfile.ZipFile, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        try:
            height, width, _ = decode_stored(archive.read(name)).shape
        except (BadImageError, zipfile.BadZipFile) as error:
            yield f"{name}: {error}"
            continue
        short, long = sorted((height, width))
        is_wrong = manifest.size not in {None, short, (height, width)} or (manifest.square and short != long)
        if is_wrong or not manifest.min_side <= short <= long <= manifest.max_side:
            yield f"{name} has {width} x {height} pixels, which contradicts the manifest"


def _errors_of_set(root: Path, manifest: DatasetManifest, reports: dict[str, ShardReport]) -> Iterator[str]:
    for split in SPLITS:
        images = sum(report.images for name, report in reports.items() if name.startswith(f"{split}/"))
        if images != manifest.counts[split]:
            yield f"{images} images in {split}, but {manifest.counts[split]} in the manifest"
    rejects = sum(len(report.rejects) for report in reports.values())
    listed = len((root / REJECTS).read_bytes().splitlines()) if (root / REJECTS).is_file() else 0
    if not rejects == listed == manifest.rejects:
        yield f"{rejects} rejected images in the shards, {listed} in {REJECTS}, {manifest.rejects} in the manifest"
    if content_hash(reports) != manifest.hash:
        yield "the shards have no errors, but the manifest was written for other shards (their hash differs)"


# The contact sheet


class _Row(NamedTuple):
    """A row of the contact sheet."""

    caption: str
    split: Split
    indices: Sequence[int]


def show(root: Path, out: Path | None, *, console: Console) -> None:
    """Make a contact sheet of evenly spaced images, with a row for each class if the set has classes.

    Args:
        root: The set's folder.
        out: Path of the picture; None writes it beside the folder, under the folder's name.
        console: Console for the result.

    Raises:
        BadRequestError: The folder holds no finished prepared set, `out` has no .png suffix, or the picture is a file
            that movq did not write.
        FailureError: A shard is damaged, or the picture cannot be written.
    """
    path = out or root.resolve().with_name(f"{root.resolve().name}.png")
    require_name(path, "OUT", PICTURE)
    refuse_foreign(path, PICTURE)
    rows = list(_rows(PreparedSet.open(root)))
    text = json.dumps({"contact_sheet": {"images": sum(len(row.indices) for row in rows)}})
    atomic_write(path, encode_png(_sheet(rows), text=text))
    console.result({"path": str(path), "images": sum(len(row.indices) for row in rows)}, str(path))


def _rows(prepared: PreparedSet) -> Iterator[_Row]:
    """Yield at most `_ROWS` rows of training images, and one row of held-out images."""
    from movq_cli.data.spacing import evenly_spaced

    train, held_out = (prepared.split(split) for split in SPLITS)
    if train.labels is None:
        chosen = evenly_spaced(len(train), _ROWS * _COLUMNS)
        for start in range(0, len(chosen), _COLUMNS):
            yield _Row("" if start else f"train, {len(train)} images", train, chosen[start : start + _COLUMNS])
    else:
        present = np.unique(train.labels)
        for label in present[evenly_spaced(len(present), _ROWS)]:
            (members,) = np.nonzero(train.labels == label)
            caption = f"train, {train.classes[label]}: {len(members)} images"
            yield _Row(caption, train, members[evenly_spaced(len(members), _COLUMNS)].tolist())
    if len(held_out):
        yield _Row(f"val, {len(held_out)} images", held_out, evenly_spaced(len(held_out), _COLUMNS))


def _sheet(rows: Sequence[_Row]) -> Image.Image:
    heights = [(_CAPTION if row.caption else 0) + _TILE + _GAP for row in rows]
    sheet = Image.new("RGB", (_COLUMNS * (_TILE + _GAP), sum(heights)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        # A folder's name may have bytes that are not UTF-8.
        draw.text((_GAP, top), row.caption.encode(errors="replace").decode(), fill=(0, 0, 0))
        for column, index in enumerate(row.indices):
            sheet.paste(_tile(row.split.pixels(index)), (column * (_TILE + _GAP), top + height - _TILE - _GAP))
        top += height
    return sheet


def _tile(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return the central square, reduced to the side of a tile or enlarged by the largest whole number that fits."""
    side = min(pixels.shape[:2])
    square = center_crop(Image.fromarray(pixels), side)
    if side > _TILE:
        return square.resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    scaled = side * (_TILE // side)
    return square.resize((scaled, scaled), Image.Resampling.NEAREST)
