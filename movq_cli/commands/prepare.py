"""`movq prepare`: make a prepared set from any images, on all cores, resumable, with the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from movq_cli import signals
from movq_cli.commands.prepare_again import check_source, describe_differences
from movq_cli.commands.prepare_plan import DEFAULT_MAX_SIDE, Plan, Preprocessing, cut_into_shards
from movq_cli.commands.workers import results
from movq_cli.console import Console
from movq_cli.data import frames
from movq_cli.data.images import BadImageError, deep_maximum
from movq_cli.data.shard_writer import Reject, ShardReport, content_hash
from movq_cli.data.shards import MANIFEST, PLAN, REJECTS, SOURCES, SPLITS, DatasetManifest, SplitName
from movq_cli.data.spacing import evenly_spaced
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import atomic_write, locked, write_once
from movq_cli.sources.duplicates import HASH_BYTES, Hashing, find_duplicates
from movq_cli.sources.label_files import label_held_out
from movq_cli.sources.open import open_source
from movq_cli.sources.outputs import mark_output, refuse_name_of_set
from movq_cli.sources.source import Source
from movq_cli.sources.splits import split_images
from movq_cli.text_encoding import storable_text

DEFAULT_VAL = "0.1"
"""Held-out images of a request that says nothing of them."""

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
    val: str = DEFAULT_VAL
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
    """Make a prepared set. Called again after an interruption or the removal of a shard, it makes the missing shards.

    Args:
        request: The set to make.
        console: Console for progress, messages and the result.

    Raises:
        BadRequestError: The source or the folder cannot be used, or no image of a split can be used.
        FailureError: Writing failed or a worker process died, and finished shards stay; or the images of a finished
            set have changed.
        InterruptedRunError: The process was interrupted; finished shards stay.
    """
    with signals.interruptible("the finished shards", launched=False):
        plan = _make_plan(request, console)
        _announce(plan, console)
        with locked(plan.out, "movq prepare", shared=plan.is_shared):
            manifest = _complete(plan, request, console)
        if manifest is None:
            return
        _remove_leftovers(plan)
    train, held_out = (manifest.counts[split] for split in SPLITS)
    others = {"rejected": manifest.rejects, "classes": len(manifest.classes)}
    console.result({"path": str(plan.out), "train": train, "val": held_out, **others}, str(plan.out))


def _complete(plan: Plan, request: PrepareRequest, console: Console) -> DatasetManifest | None:
    """Make what is missing of the set; return None if other jobs still have shards to make."""
    _check_plan(plan)
    _write_plan(plan)
    mark_output(plan.out, plan.source.location)
    _check_plan(plan)  # of several jobs that started at once, one has written the plan
    compared = check_source(plan, request.workers, console)
    finished = _read_manifest(plan, console)
    if finished is not None:
        reports = _make_shards(replace(plan, digests=finished.digests), request.workers, console)
        _check_finished(plan, finished, reports)
        console.log(f"{plan.out} is already prepared with these settings ({compared}); remove it to prepare it again")
        return finished
    part = request.shard
    reports = _make_shards(plan if part is None else plan.part(*part), request.workers, console)
    missing = len(plan.shards) - len(plan.finished_shards())
    if missing:
        _report_missing(plan, missing, console)
        return None
    if part is not None:
        reports = _make_shards(plan, request.workers, console)
    return _finish(plan, reports, console)


def _write_plan(plan: Plan) -> None:
    """Write the plan unless it exists."""
    path, data = plan.out / PLAN, plan.encode().encode()
    if path.exists():
        return
    if not plan.is_shared:
        atomic_write(path, data)
        return
    try:
        write_once(path, data)
    except (FailureError, FileNotFoundError):
        if not path.exists():
            raise
        # Another job has finished the set in the meantime, and has removed the temporary file of this one.


def _read_manifest(plan: Plan, console: Console) -> DatasetManifest | None:
    """Return the manifest of a finished set; None if it must be written (again)."""
    if not (plan.out / MANIFEST).exists():
        return None
    try:
        return DatasetManifest.read(plan.out)
    except BadRequestError as error:
        console.warn(f"{error.message}; it is written again")
        return None


def _check_finished(plan: Plan, manifest: DatasetManifest, reports: Mapping[str, ShardReport]) -> None:
    """Refuse a set whose shards are not those of its manifest, and write the list of rejected images if it differs.

    Raises:
        FailureError: A shard was made from other images.
    """
    if content_hash(reports) != manifest.hash:
        remedy = f"If the source has changed, remove {plan.out} and run the same `movq prepare` again."
        raise FailureError(f"the shards of {plan.out} are not those of its {MANIFEST}", remedy)
    path, rejects = plan.out / REJECTS, _encode_rejects(_rejects(plan, reports))
    if not path.is_file() or path.read_bytes() != rejects:
        atomic_write(path, rejects, concurrent=plan.is_shared)


def _remove_leftovers(plan: Plan) -> None:
    """Remove the temporary files that killed jobs have left, unless another job is at work."""

    def leftovers() -> list[Path]:
        folders = (plan.out, *(plan.out / split for split in SPLITS))
        return [*plan.out.glob(f"{PLAN}.*"), *(path for folder in folders for path in folder.glob("*.partial"))]

    if not leftovers():
        return
    with suppress(BadRequestError), locked(plan.out, "movq prepare"):
        for path in leftovers():
            path.unlink(missing_ok=True)


def _make_plan(request: PrepareRequest, console: Console) -> Plan:
    source = open_source(request.source)
    refuse_name_of_set(source, request.out)
    if request.val_labels is not None:
        source = label_held_out(source, request.val_labels)
    if not request.keep_labels:
        source = replace(source, labels=None, classes=(), label_warnings=())
    for warning in (*source.warnings, *source.label_warnings):
        console.warn(warning)
    if source.has_val and request.val != DEFAULT_VAL:
        console.warn(
            f"{source.location} has a val split of its own, beside which --val {request.val} has no effect. To split "
            "its training images anew, give these alone as the source."
        )
    if request.preprocessing.white is None:
        _warn_of_dark_images(source, console)
    duplicates = _find_duplicates(source, request.workers, console) if request.drop_duplicates else None

    def is_usable(index: int) -> bool:
        return index not in (duplicates or ()) and request.preprocessing.accepts(source, index)

    splits = split_images(source, request.val, request.val_list, is_usable)
    is_shared = request.shard is not None
    return Plan(source, request.out, request.preprocessing, cut_into_shards(splits), duplicates, is_shared)


def _warn_of_dark_images(source: Source, console: Console) -> None:
    """Warn if gray images of 16 bits hold values of fewer bits, as cameras and scanners of 12 bits write them."""
    largest = 0
    for index in evenly_spaced(len(source), _EXAMINED):
        with suppress(BadImageError):
            largest = max(largest, deep_maximum(source.read(index)) or 0)
    bits = largest.bit_length()
    if 0 < bits < _FEWER_BITS:
        console.warn(
            f"the gray images of 16 bits have values of up to {largest} only, so that they become dark: white is "
            f"65535. If these are {bits} bits, pass --white {2**bits - 1}"
        )


_EXAMINED = 8
"""Number of images in which the largest value is looked for."""

_FEWER_BITS = 15
"""Bits of a value; with fewer of them the brightest image is darker than a fourth of white."""


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
    origin = "split of the source" if source.has_val else "split made here"
    console.log(f"source: {source.location}, {len(source)} images, {len(source.classes)} classes")
    console.log(f"split: {train} train, {held_out} val ({origin})")
    if plan.duplicates is not None:
        console.log(f"duplicates: {len(plan.duplicates)} images equal an earlier file and are left out")
    size = preprocessing.size
    resizing = f"short side {size}" if size else f"original size, short side at most {DEFAULT_MAX_SIDE}"
    cropping = "central square" if preprocessing.square else "uncropped"
    if isinstance(size, tuple):
        resizing, cropping = "resized to cover the crop", f"central crop of height {size[0]} and width {size[1]}"
    console.log(f"images: {resizing}, {cropping}, filter {preprocessing.filter}")


def _check_plan(plan: Plan) -> None:
    """Refuse a folder with other files, or with a prepared set of another plan."""
    path = plan.out / PLAN
    names = {entry.name for entry in plan.out.iterdir()}
    if PLAN not in names:
        if not all(name.startswith((PLAN, SOURCES)) for name in names):  # another job may be writing the plan
            raise BadRequestError(f"{plan.out} is not empty and holds no prepared set", "Choose a new folder.")
    elif path.read_bytes() != plan.encode().encode():
        differences = describe_differences(plan)
        message = f"{plan.out} holds a prepared set of another source or other settings ({differences}; see {path})"
        raise BadRequestError(message, "Choose a new folder, remove that one, or repeat the settings of the set.")


def _make_shards(plan: Plan, workers: int, console: Console) -> dict[str, ShardReport]:
    """Make the shards that are missing, and return the report of every shard by its name.

    A warning counts the files of which only the first page or frame was used.
    """
    finished = plan.finished_shards()
    sizes = [len(shard.indices) for shard in plan.shards]
    if finished:
        console.log(f"resuming: {len(finished)} of {len(sizes)} shards exist")
    done = sum(len(shard.indices) for shard in plan.shards if shard.name in finished)
    reports: dict[str, ShardReport] = {}
    several: list[str] = []
    with (
        results(plan.make_shard, len(plan.shards), workers) as made,
        console.progress(sum(sizes), "preparing", "images", done) as progress,
    ):
        for number, shard in made:
            name = plan.shards[number].name
            reports[name] = shard.report
            several += shard.several
            if name not in finished:
                progress.advance(sizes[number])
    if several:
        console.warn(frames.first_only_warning(several))
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
    rejects = _rejects(plan, reports)
    atomic_write(plan.out / REJECTS, _encode_rejects(rejects), concurrent=plan.is_shared)
    if rejects:
        console.warn(f"{len(rejects)} of {len(plan.source)} images were rejected: see {plan.out / REJECTS}")
    counts = dict.fromkeys(SPLITS, 0)
    for shard in plan.shards:
        counts[shard.split] += reports[shard.name].images
    for split in {shard.split for shard in plan.shards}:
        if not counts[split]:
            _refuse_empty_split(plan, split, [reject for its_split, reject in rejects if its_split == split])
    manifest = _manifest(plan, reports, counts, len(rejects))
    manifest.write(plan.out, concurrent=plan.is_shared)
    return manifest


def _rejects(plan: Plan, reports: Mapping[str, ShardReport]) -> list[tuple[SplitName, Reject]]:
    return [(shard.split, reject) for shard in plan.shards for reject in reports[shard.name].rejects]


def _encode_rejects(rejects: Sequence[tuple[SplitName, Reject]]) -> bytes:
    lines = [json.dumps({"split": split, "name": name, "reason": reason}) for split, (name, reason) in rejects]
    return "".join(line + "\n" for line in lines).encode()


def _refuse_empty_split(plan: Plan, split: SplitName, rejects: Sequence[Reject]) -> NoReturn:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejects[:_REASONS_SHOWN])
    message = f"none of the {len(rejects)} images of {plan.source.location} for {split} can be used ({reasons})"
    raise BadRequestError(message, f"See {plan.out / REJECTS}; remove {plan.out} before the next attempt.")


def _manifest(
    plan: Plan, reports: Mapping[str, ShardReport], counts: dict[SplitName, int], rejects: int
) -> DatasetManifest:
    sides = [side for report in reports.values() for side in report.sides or ()]
    return DatasetManifest(
        source=storable_text(plan.source.location),
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
