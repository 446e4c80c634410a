"""`movq prepare`: make a prepared set from any images, on all cores, resumable, with the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from movq_cli.commands.prepare_plan import DEFAULT_MAX_SIDE, Plan, Preprocessing, cut_into_shards
from movq_cli.commands.workers import results
from movq_cli.console import Console
from movq_cli.data.images import FILTER
from movq_cli.data.shards import (
    MANIFEST,
    PLAN,
    REJECTS,
    SPLITS,
    DatasetManifest,
    Reject,
    ShardReport,
    SplitName,
    content_hash,
)
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write, locked, write_once
from movq_cli.sources.duplicates import HASH_BYTES, Hashing, find_duplicates
from movq_cli.sources.label_files import label_held_out
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source
from movq_cli.sources.splits import split_images

_REASONS_SHOWN = 3


@dataclass(frozen=True)
class PrepareRequest:
    """A request to make a prepared set."""

    source: str
    """Location of the images, as for `open_source`."""
    out: Path
    """Folder of the set: new, empty, or with an unfinished set of the same request."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """Operations on each image."""
    val: str = "0.1"
    """Held-out images, if neither the source nor a list names them: a share ("0.1"), a number ("500") or "nvidia"."""
    val_list: Path | None = None
    """File with the names of the held-out images, one in each line."""
    val_labels: Path | None = None
    """File with the classes of the held-out images, for a source with class folders in `train` only."""
    keep_labels: bool = True
    """Whether the classes of the images are stored."""
    drop_duplicates: bool = False
    """Whether only the first by name of equal files is stored; the others are rejected, in whichever split they are."""
    workers: int = 1
    """Number of processes; with 0 or 1 the work is done in this process."""
    shard: tuple[int, int] | None = None
    """(I, N), I from 0 or from 1: make every N-th shard only. The job that finds all shards finished completes the
    set. None makes all shards."""


def prepare(request: PrepareRequest, console: Console) -> None:
    """Make a prepared set. Called again after an interruption, it makes only the missing shards.

    Args:
        request: The set to make.
        console: Console for progress, messages and the result.

    Raises:
        BadRequestError: The source or the folder cannot be used, or no image of a split can be used.
        FailureError: Writing failed or a worker process died; finished shards stay.
    """
    plan = _make_plan(request, console)
    _announce(plan, console)
    out, part = plan.out, request.shard
    with locked(out, "movq prepare", shared=plan.is_shared):
        _check_plan(plan)
        if (out / MANIFEST).exists():
            console.log(f"{out} is already prepared with these settings; remove it to prepare it again")
            manifest = DatasetManifest.read(out)
        else:
            (write_once if plan.is_shared else atomic_write)(out / PLAN, plan.encode().encode())
            _check_plan(plan)  # of several jobs that started at once, one has written the plan
            reports = _make_shards(plan if part is None else plan.part(*part), request.workers, console)
            missing = len(plan.shards) - len(plan.finished_shards())
            if missing:
                _report_missing(plan, missing, console)
                return
            if part is not None:
                reports = _make_shards(plan, request.workers, console)
            manifest = _finish(plan, reports, console)
    train, held_out = (manifest.counts[split] for split in SPLITS)
    others = {"rejected": manifest.rejects, "classes": len(manifest.classes)}
    console.result({"path": str(out), "train": train, "val": held_out, **others}, str(out))


def _make_plan(request: PrepareRequest, console: Console) -> Plan:
    source = open_source(request.source)
    if request.val_labels is not None:
        source = label_held_out(source, request.val_labels)
    if not request.keep_labels:
        source = replace(source, labels=None, classes=())
    duplicates = _find_duplicates(source, request.workers, console) if request.drop_duplicates else None

    def is_usable(index: int) -> bool:
        return index not in (duplicates or ()) and request.preprocessing.accepts(source, index)

    splits = split_images(source, request.val, request.val_list, is_usable)
    is_shared = request.shard is not None
    return Plan(source, request.out, request.preprocessing, cut_into_shards(splits), duplicates, is_shared)


def _report_missing(plan: Plan, missing: int, console: Console) -> None:
    """Report the result of a job after which other jobs still have shards to make."""
    console.warn(
        f"{missing} of {len(plan.shards)} shards are missing: the last job completes the set, "
        "or any job that is started again after the others"
    )
    console.result({"path": str(plan.out), "shards": len(plan.shards), "missing": missing}, str(plan.out))


def _announce(plan: Plan, console: Console) -> None:
    source, preprocessing = plan.source, plan.preprocessing
    train, held_out = (sum(len(shard.indices) for shard in plan.shards if shard.split == split) for split in SPLITS)
    origin = "split of the source" if source.splits is not None else "split made here"
    console.log(f"source: {source.location}, {len(source)} images, {len(source.classes)} classes")
    console.log(f"split: {train} train, {held_out} val ({origin})")
    if plan.duplicates is not None:
        console.log(f"duplicates: {len(plan.duplicates)} images equal an earlier file and are left out")
    size = preprocessing.size
    resizing = f"short side {size}" if size else f"original size, short side at most {DEFAULT_MAX_SIDE}"
    console.log(f"images: {resizing}, {'central square' if preprocessing.square else 'uncropped'}, filter {FILTER}")


def _check_plan(plan: Plan) -> None:
    """Refuse a folder with other files, or with a prepared set of another plan."""
    path = plan.out / PLAN
    names = {entry.name for entry in plan.out.iterdir()}
    if PLAN not in names:
        if not all(name.startswith(PLAN) for name in names):  # another job may be writing the plan
            raise BadRequestError(f"{plan.out} is not empty and holds no prepared set", "Choose a new folder.")
    elif path.read_text() != plan.encode():
        message = f"{plan.out} holds a prepared set of another source or other settings (see {path})"
        raise BadRequestError(message, "Choose a new folder, remove that one, or repeat the settings of the set.")


def _make_shards(plan: Plan, workers: int, console: Console) -> dict[str, ShardReport]:
    """Make the shards that are missing, and return the report of every shard by its name."""
    finished = plan.finished_shards()
    sizes = [len(shard.indices) for shard in plan.shards]
    if finished:
        console.log(f"resuming: {len(finished)} of {len(sizes)} shards exist")
    done = sum(len(shard.indices) for shard in plan.shards if shard.name in finished)
    reports: dict[str, ShardReport] = {}
    with (
        results(plan.make_shard, len(plan.shards), workers) as made,
        console.progress(sum(sizes), "preparing", "images", done) as progress,
    ):
        for number, report in made:
            name = plan.shards[number].name
            reports[name] = report
            if name not in finished:
                progress.advance(sizes[number])
    return reports


def _find_duplicates(source: Source, workers: int, console: Console) -> dict[int, int]:
    """Return the images that equal an earlier file, and the first image with that file."""
    hashing = Hashing(source)
    hashes = [b""] * hashing.chunks
    with (
        results(hashing.hash_chunk, hashing.chunks, workers) as made,
        console.progress(len(source), "comparing", "images") as progress,
    ):
        for number, chunk in made:
            hashes[number] = chunk
            progress.advance(len(chunk) // HASH_BYTES)
    return find_duplicates(hashes)


def _finish(plan: Plan, reports: Mapping[str, ShardReport], console: Console) -> DatasetManifest:
    """Write the list of rejected images and the manifest, which makes the set a finished one."""
    rejects = [(shard.split, reject) for shard in plan.shards for reject in reports[shard.name].rejects]
    lines = [json.dumps({"split": split, "name": name, "reason": reason}) for split, (name, reason) in rejects]
    atomic_write(plan.out / REJECTS, "".join(line + "\n" for line in lines).encode(), concurrent=plan.is_shared)
    if rejects:
        console.warn(f"{len(rejects)} of {len(plan.source)} images were rejected: see {plan.out / REJECTS}")
    counts = dict.fromkeys(SPLITS, 0)
    for shard in plan.shards:
        counts[shard.split] += reports[shard.name].images
    for split in {shard.split for shard in plan.shards}:
        if not counts[split]:
            _refuse_empty_split(plan, split, [reject for its_split, reject in rejects if its_split == split])
    manifest = _manifest(plan, reports, counts, len(rejects))
    for partial in (path for folder in ("", *SPLITS) for path in (plan.out / folder).glob("*.partial")):
        partial.unlink(missing_ok=True)  # killed jobs have left them
    manifest.write(plan.out, concurrent=plan.is_shared)
    return manifest


def _refuse_empty_split(plan: Plan, split: SplitName, rejects: Sequence[Reject]) -> NoReturn:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejects[:_REASONS_SHOWN])
    message = f"none of the {len(rejects)} images of {plan.source.location} for {split} can be used ({reasons})"
    raise BadRequestError(message, f"See {plan.out / REJECTS}; remove {plan.out} before the next attempt.")


def _manifest(
    plan: Plan, reports: Mapping[str, ShardReport], counts: dict[SplitName, int], rejects: int
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
        drop_duplicates=plan.duplicates is not None,
        hash=content_hash(reports),
        digests={name: reports[name].digest for name in sorted(reports)},
        **asdict(plan.preprocessing),
    )
