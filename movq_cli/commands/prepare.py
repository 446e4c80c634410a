"""`movq prepare`: any images to a prepared set, with all cores, resumable, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image

from movq_cli.commands.workers import results
from movq_cli.console import Console
from movq_cli.data import png
from movq_cli.data.images import FILTER, BadImageError, center_crop, decode, resize_short_side
from movq_cli.data.shards import (
    MANIFEST,
    PLAN,
    REJECTS,
    SHARD_IMAGES,
    SPLITS,
    DatasetManifest,
    Entry,
    Reject,
    ShardReport,
    SplitName,
    content_hash,
    inspect_shard,
    member_name,
    shard_path,
    write_shard,
)
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write, locked, write_once
from movq_cli.sources.duplicates import Hashing, later_copies
from movq_cli.sources.label_files import label_held_out
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source
from movq_cli.sources.splits import split_images

LARGEST_OWN_SIDE = 256
"""Without a size, images keep their own, but a short side above this is reduced to it."""

_REASONS_SHOWN = 3


@dataclass(frozen=True)
class Policy:
    """What becomes of one image."""

    size: int | None  # short side, pixels; None = its own, at most LARGEST_OWN_SIDE
    square: bool  # cut to the central square
    upscale: bool  # enlarge smaller images, not refuse them
    background: tuple[int, int, int]  # RGB in 0..255, below transparent pixels
    orientation: bool  # turn upright as EXIF says
    compression: png.Compression  # of the stored file

    def apply(self, data: bytes) -> Image.Image:
        """Decode, resize and crop an image file.

        Raises:
            BadImageError: It cannot be used; says why.
        """
        image = decode(data, background=self.background, orientation=self.orientation)
        size = self.size or min(LARGEST_OWN_SIDE, *image.size)
        image = resize_short_side(image, size, upscale=self.upscale)
        return center_crop(image, size) if self.square else image

    def accepts(self, source: Source, index: int) -> bool:
        """Whether an image of a source can be used."""
        try:
            self.apply(source.read(index))
        except BadImageError:
            return False
        return True


class Shard(NamedTuple):
    """A unit of work: up to `SHARD_IMAGES` source images of a split."""

    split: SplitName
    number: int
    indices: tuple[int, ...]  # into the source

    @property
    def name(self) -> str:
        """Its file below the set's folder."""
        return f"{self.split}/{self.number:05d}.zip"


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of a set; a worker's part of it is a pure function of this."""

    source: Source
    out: Path
    policy: Policy
    shards: tuple[Shard, ...]
    copies: Mapping[int, int] | None  # left out, and which image each is the same file as; None = nobody looked
    contested: bool  # other processes may be making shards of the same set

    def make(self, number: int) -> ShardReport:
        """Make one of the shards unless it is there, and report what its file holds.

        Raises:
            FailureError: It could not be written.
        """
        shard = self.shards[number]
        path = shard_path(self.out, shard.split, shard.number)
        if not path.exists():
            write_shard(path, self._images(shard), contested=self.contested)
        return inspect_shard(path)

    def there(self) -> set[str]:
        """The names of the shards that are finished."""
        # By listing: a network file system may remember for a while that a file was not there.
        found = {f"{split}/{path.name}" for split in SPLITS for path in (self.out / split).glob("*.zip")}
        return found & {shard.name for shard in self.shards}

    def part(self, number: int, parts: int) -> Plan:
        """Every `parts`-th shard."""
        return replace(self, shards=self.shards[number % parts :: parts])

    def _images(self, shard: Shard) -> Iterator[Entry | Reject]:
        labels = self.source.labels
        for place, index in enumerate(shard.indices, start=shard.number * SHARD_IMAGES):
            name = self.source.names[index]
            if self.copies and index in self.copies:
                yield Reject(name, f"the same file as {self.source.names[self.copies[index]]}")
                continue
            try:
                image = self.policy.apply(self.source.read(index))
            except BadImageError as error:
                yield Reject(name, str(error))
            else:
                data = png.encode(np.asarray(image), self.policy.compression)
                yield Entry(member_name(place), data, None if labels is None else labels[index], name)

    def record(self) -> str:
        """What `plan.json` holds: equal for equal plans, and for them alone."""
        place = Path(self.source.location)
        settings = {
            "format": 1,
            "source": str(place.resolve()) if place.exists() else self.source.location,
            "filter": FILTER,
            **asdict(self.policy),
            "drop_duplicates": self.copies is not None,
        }
        what = [settings, self.source.names, self.source.labels, self.source.classes, self.shards, self.copies]
        fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        return json.dumps({**settings, "images": len(self.source), "fingerprint": fingerprint}, indent=2) + "\n"


def prepare(
    source: str,
    out: Path,
    *,
    size: int | None,
    square: bool,
    val: str,
    val_list: Path | None,
    upscale: bool,
    background: tuple[int, int, int],
    labels: bool,
    orientation: bool,
    workers: int,
    console: Console,
    compression: png.Compression = "none",
    shard: tuple[int, int] | None = None,
    drop_duplicates: bool = False,
    val_labels: Path | None = None,
) -> None:
    """Make a prepared set; run again after an interruption, it goes on where it was.

    Args:
        source: What `open_source` takes.
        out: The set's folder, new or empty, or with the same plan begun.
        size: Short side of the stored images, pixels; None keeps their own, at most `LARGEST_OWN_SIDE`.
        square: Cut to the central square after resizing.
        val: Held-out images, a share ("0.1"), a count ("500") or "nvidia", where neither the source nor a list says.
        val_list: A file with the names of the held-out images, one a line.
        upscale: Enlarge images smaller than `size`, not refuse them.
        background: RGB in 0..255 below transparent pixels.
        labels: Keep the classes.
        orientation: Turn images upright as their EXIF says.
        workers: Processes; 0 and 1 work in this one.
        console: Where to report.
        compression: Of the stored images.
        shard: (I, N), I from 0 or from 1: make every N-th shard only. Whichever of the N jobs finds all shards there
            ends the set.
        drop_duplicates: Of images that are the same file keep the first by name, in its split alone.
        val_labels: A file with the classes of the held-out images, of a source with class folders in `train` alone.

    Raises:
        BadRequestError: The source or the folder cannot be used, or no image of a split is good.
        FailureError: Writing failed or a worker died; finished shards are kept.
    """
    images = open_source(source)
    if val_labels is not None:
        images = label_held_out(images, val_labels)
    if not labels:
        images = replace(images, labels=None, classes=())
    policy = Policy(size, square, upscale, background, orientation, compression)
    copies = _find_copies(images, workers, console) if drop_duplicates else None
    splits = split_images(
        images, val, val_list, lambda index: index not in (copies or ()) and policy.accepts(images, index)
    )
    plan = Plan(images, out, policy, tuple(_cut(splits)), copies, contested=shard is not None)
    _announce(plan, console)
    with locked(out, "movq prepare", shared=plan.contested):
        _check_plan(plan)
        if (out / MANIFEST).exists():
            console.log(f"{out} is prepared already, with these settings; remove it to prepare it again")
            manifest = DatasetManifest.read(out)
        else:
            (write_once if plan.contested else atomic_write)(out / PLAN, plan.record().encode())
            _check_plan(plan)  # of jobs that began at once, one has written it
            reports = _make_all(plan if shard is None else plan.part(*shard), workers, console)
            missing = len(plan.shards) - len(plan.there())
            if missing:
                _leave(plan, missing, console)
                return
            if shard is not None:
                reports = _make_all(plan, workers, console)
            manifest = _finish(plan, reports, console)
    train, held_out = (manifest.counts[split] for split in SPLITS)
    others = {"rejected": manifest.rejects, "classes": len(manifest.classes)}
    console.result({"path": str(out), "train": train, "val": held_out, **others}, str(out))


def _leave(plan: Plan, missing: int, console: Console) -> None:
    """The end of a job whose set is not finished yet."""
    console.warn(
        f"{missing} of {len(plan.shards)} shards are not there yet: the last of the other jobs ends the set, "
        "or any job that is run again"
    )
    console.result({"path": str(plan.out), "shards": len(plan.shards), "missing": missing}, str(plan.out))


def _cut(splits: Mapping[SplitName, Sequence[int]]) -> Iterator[Shard]:
    for split, indices in splits.items():
        for number, start in enumerate(range(0, len(indices), SHARD_IMAGES)):
            yield Shard(split, number, tuple(indices[start : start + SHARD_IMAGES]))


def _announce(plan: Plan, console: Console) -> None:
    source, policy = plan.source, plan.policy
    counts = [sum(len(shard.indices) for shard in plan.shards if shard.split == split) for split in SPLITS]
    origin = "the source's own split" if source.splits is not None else "held out here"
    console.log(f"source: {source.location}, {len(source)} images, {len(source.classes)} classes")
    console.log(f"split: {counts[0]} train, {counts[1]} val ({origin})")
    size = f"short side {policy.size}" if policy.size else f"own size, short side at most {LARGEST_OWN_SIDE}"
    if plan.copies is not None:
        console.log(f"duplicates: {len(plan.copies)} images are the same file as an earlier one, and left out")
    console.log(f"images: {size}, {'centre square' if policy.square else 'uncropped'}, filter {FILTER}")


# The folder


def _check_plan(plan: Plan) -> None:
    path = plan.out / PLAN
    names = {entry.name for entry in plan.out.iterdir()}
    if PLAN not in names:
        if not all(name.startswith(PLAN) for name in names):  # another job may be writing it
            raise BadRequestError(f"{plan.out} is not empty, and no prepared set", "Choose a new folder.")
    elif path.read_text() != plan.record():
        fault = f"{plan.out} holds a prepared set of another source or other settings (see {path})"
        raise BadRequestError(fault, "Choose a new folder, remove that one, or give the same settings again.")


# The work


def _make_all(plan: Plan, workers: int, console: Console) -> dict[str, ShardReport]:
    """Every shard's report by the shard's name."""
    there = plan.there()
    sizes = [len(shard.indices) for shard in plan.shards]
    if there:
        console.log(f"going on: {len(there)} of {len(sizes)} shards are there")
    done = sum(len(shard.indices) for shard in plan.shards if shard.name in there)
    reports: dict[str, ShardReport] = {}
    with (
        results(plan.make, len(plan.shards), workers) as finished,
        console.progress(sum(sizes), "preparing", "images", done) as progress,
    ):
        for number, report in finished:
            name = plan.shards[number].name
            reports[name] = report
            if name not in there:
                progress.advance(sizes[number])
    return reports


def _find_copies(source: Source, workers: int, console: Console) -> dict[int, int]:
    """Each image that is the same file as an earlier one, and the first of these."""
    hashing = Hashing(source)
    hashes = [b""] * hashing.chunks
    with (
        results(hashing.chunk, hashing.chunks, workers) as finished,
        console.progress(len(source), "comparing", "images") as progress,
    ):
        for number, chunk in finished:
            hashes[number] = chunk
            progress.advance(len(chunk) // 32)
    return later_copies(hashes)


# The end


def _finish(plan: Plan, reports: dict[str, ShardReport], console: Console) -> DatasetManifest:
    rejects = [(shard.split, reject) for shard in plan.shards for reject in reports[shard.name].rejects]
    lines = [json.dumps({"split": split, "name": name, "reason": reason}) for split, (name, reason) in rejects]
    atomic_write(plan.out / REJECTS, "".join(line + "\n" for line in lines).encode(), concurrent=plan.contested)
    if rejects:
        console.warn(f"{len(rejects)} of {len(plan.source)} images were refused: see {plan.out / REJECTS}")
    counts = dict.fromkeys(SPLITS, 0)
    for shard in plan.shards:
        counts[shard.split] += reports[shard.name].images
    for split in {shard.split for shard in plan.shards}:
        if not counts[split]:
            _refuse(plan, split, [reject for place, reject in rejects if place == split])
    manifest = _describe(plan, reports, counts, len(rejects))
    for left in (partial for split in SPLITS for partial in (plan.out / split).glob("*.partial")):
        left.unlink(missing_ok=True)  # of killed jobs
    manifest.write(plan.out, contested=plan.contested)
    return manifest


def _refuse(plan: Plan, split: SplitName, rejects: Sequence[Reject]) -> NoReturn:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejects[:_REASONS_SHOWN])
    fault = f"none of the {len(rejects)} images of {plan.source.location} for {split} can be used ({reasons})"
    raise BadRequestError(fault, f"See {plan.out / REJECTS}; remove {plan.out} before another try.")


def _describe(
    plan: Plan, reports: dict[str, ShardReport], counts: dict[SplitName, int], rejects: int
) -> DatasetManifest:
    sides = [side for report in reports.values() for side in report.sides or ()]
    return DatasetManifest(
        source=plan.source.location,
        filter=FILTER,
        counts=counts,
        shards={split: sum(shard.split == split for shard in plan.shards) for split in SPLITS},
        classes=plan.source.classes,
        min_side=min(sides),
        max_side=max(sides),
        rejects=rejects,
        drop_duplicates=plan.copies is not None,
        hash=content_hash(reports),
        **asdict(plan.policy),
    )
