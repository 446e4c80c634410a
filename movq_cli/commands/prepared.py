"""`movq prepare --check` and `--show`: a prepared set verified to the byte, and at a glance."""

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

from movq_cli.console import Console
from movq_cli.data.images import BadImageError, center_crop, encode_png
from movq_cli.data.shards import (
    INDEX,
    MANIFEST,
    REJECTS,
    SPLITS,
    DatasetManifest,
    PreparedSet,
    ShardReport,
    Split,
    content_hash,
    decode_stored,
    inspect_shard,
    shard_path,
)
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import atomic_write

_COLUMNS = 8
_ROWS = 10
_TILE = 128  # pixels a side; smaller images are enlarged by a whole number
_GAP = 2
_CAPTION = 14

# Checking


class _Finding(NamedTuple):
    """What a shard holds, where it can be read at all, and what is wrong with it."""

    report: ShardReport | None
    faults: tuple[str, ...]


def check(root: Path, *, workers: int, console: Console) -> None:
    """Verify a prepared set: checksums, pixels, sizes, labels and counts.

    Args:
        root: The set's folder.
        workers: Threads.
        console: Where to report; each fault is a warning.

    Raises:
        BadRequestError: No finished prepared set is there.
        FailureError: Something is wrong with it.
    """
    manifest = DatasetManifest.read(root)
    shards = {
        f"{split}/{number:05d}.zip": shard_path(root, split, number)
        for split in SPLITS
        for number in range(manifest.shards[split])
    }
    reports: dict[str, ShardReport] = {}
    faults = 0
    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        console.progress(len(shards), "checking", "shards") as progress,
    ):
        for name, finding in zip(shards, pool.map(partial(_inspect, manifest), shards.values()), strict=True):
            if finding.report is not None:
                reports[name] = finding.report
            for fault in finding.faults:
                console.warn(f"{shards[name]}: {fault}")
            faults += len(finding.faults)
            progress.advance()
    for fault in _faults_of_set(root, manifest, reports) if not faults else ():
        console.warn(f"{root}: {fault}")
        faults += 1
    if faults:
        remedy = f"Remove the shards named above and {root / MANIFEST}, and run the same `movq prepare` again."
        raise FailureError(f"the prepared set {root} is damaged: {faults} faults", remedy)
    train, held_out = (manifest.counts[split] for split in SPLITS)
    others = {"rejected": manifest.rejects, "classes": len(manifest.classes), "hash": manifest.hash}
    text = f"{root}\t{train} train, {held_out} val, {len(shards)} shards: good"
    console.result({"path": str(root), "train": train, "val": held_out, **others}, text)


def _inspect(manifest: DatasetManifest, path: Path) -> _Finding:
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read(INDEX))
            names = [info.filename for info in archive.infolist() if info.filename != INDEX]
            faults = (*_faults_of_index(manifest, index, names), *_faults_of_images(manifest, archive, names))
        return _Finding(inspect_shard(path), faults)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return _Finding(None, (f"cannot be read: {reason}",))


def _faults_of_index(manifest: DatasetManifest, index: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    if list(index["sources"]) != names:
        yield f"{INDEX} names {len(index['sources'])} images and not the {len(names)} that are there"
    labels = index["labels"] or []
    if [name for name, _ in labels] != (names if manifest.classes else []):
        yield f"{len(labels)} labels for {len(names)} images of a set with {len(manifest.classes)} classes"
    for name, label in labels:
        if label not in range(len(manifest.classes)):
            yield f"{name} has the label {label}, and there are {len(manifest.classes)} classes"


def _faults_of_images(manifest: DatasetManifest, archive: zipfile.ZipFile, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        try:
            height, width, _ = decode_stored(archive.read(name)).shape
        except (BadImageError, zipfile.BadZipFile) as error:
            yield f"{name}: {error}"
            continue
        short, long = sorted((height, width))
        wrong = manifest.size not in {None, short} or (manifest.square and short != long)
        if wrong or not manifest.min_side <= short <= long <= manifest.max_side:
            yield f"{name} has {width} x {height} pixels, against the manifest"


def _faults_of_set(root: Path, manifest: DatasetManifest, reports: dict[str, ShardReport]) -> Iterator[str]:
    for split in SPLITS:
        images = sum(report.images for name, report in reports.items() if name.startswith(f"{split}/"))
        if images != manifest.counts[split]:
            yield f"{images} images in {split}, and {manifest.counts[split]} in the manifest"
    rejects = sum(len(report.rejects) for report in reports.values())
    listed = len((root / REJECTS).read_bytes().splitlines()) if (root / REJECTS).is_file() else 0
    if not rejects == listed == manifest.rejects:
        yield f"{rejects} refused images in the shards, {listed} in {REJECTS}, {manifest.rejects} in the manifest"
    if content_hash(reports) != manifest.hash:
        yield "the shards are whole, but not those that the manifest was written for (their hash is another)"


# Showing


class _Row(NamedTuple):
    caption: str
    split: Split
    indices: Sequence[int]


def show(root: Path, out: Path | None, *, console: Console) -> None:
    """Make a contact sheet: evenly spread images, class by class where there are classes.

    Args:
        root: The set's folder.
        out: The picture; None = beside the folder, under its name.
        console: Where to report.

    Raises:
        BadRequestError: No finished prepared set is there, or `out` is no name of a PNG.
        FailureError: A shard is damaged, or the picture cannot be written.
    """
    path = out or root.resolve().with_name(f"{root.resolve().name}.png")
    if path.suffix.lower() != ".png":
        raise BadRequestError(f"{path} is not the name of a .png file")
    rows = list(_rows(PreparedSet.open(root)))
    atomic_write(path, encode_png(_sheet(rows)))
    console.result({"path": str(path), "images": sum(len(row.indices) for row in rows)}, str(path))


def _rows(prepared: PreparedSet) -> Iterator[_Row]:
    """Up to `_ROWS` rows of training images, and one of those held out."""
    train, held_out = (prepared.split(split) for split in SPLITS)
    if train.labels is None:
        chosen = _spread(len(train), _ROWS * _COLUMNS)
        for start in range(0, len(chosen), _COLUMNS):
            yield _Row("" if start else f"train, {len(train)} images", train, chosen[start : start + _COLUMNS])
    else:
        present = np.unique(train.labels)
        for label in present[_spread(len(present), _ROWS)]:
            (members,) = np.nonzero(train.labels == label)
            caption = f"train, {train.classes[label]}: {len(members)} images"
            yield _Row(caption, train, members[_spread(len(members), _COLUMNS)].tolist())
    if len(held_out):
        yield _Row(f"val, {len(held_out)} images", held_out, _spread(len(held_out), _COLUMNS))


def _spread(total: int, wanted: int) -> list[int]:
    return [round(place) for place in np.linspace(0, total - 1, min(total, wanted))]


def _sheet(rows: Sequence[_Row]) -> Image.Image:
    heights = [(_CAPTION if row.caption else 0) + _TILE + _GAP for row in rows]
    sheet = Image.new("RGB", (_COLUMNS * (_TILE + _GAP), sum(heights)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        # A folder's name may hold bytes that are no text.
        draw.text((_GAP, top), row.caption.encode(errors="replace").decode(), fill=(0, 0, 0))
        for column, index in enumerate(row.indices):
            sheet.paste(_tile(row.split.pixels(index)), (column * (_TILE + _GAP), top + height - _TILE - _GAP))
        top += height
    return sheet


def _tile(pixels: NDArray[np.uint8]) -> Image.Image:
    """The central square at the size of a tile, or at the largest whole multiple of its own below that."""
    side = min(pixels.shape[:2])
    square = center_crop(Image.fromarray(pixels), side)
    if side > _TILE:
        return square.resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    scaled = side * (_TILE // side)
    return square.resize((scaled, scaled), Image.Resampling.NEAREST)
