"""`movq prepare` for a set that exists: what differs from the request, and which source images have changed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from movq_cli import digests
from movq_cli.commands.prepare_plan import Plan, Shard
from movq_cli.commands.workers import results
from movq_cli.console import Console
from movq_cli.data.shard_index import read_index, reading
from movq_cli.data.shard_writer import Reject
from movq_cli.data.shards import PLAN, SOURCES, shard_path
from movq_cli.digests import Header
from movq_cli.errors import BadRequestError
from movq_cli.sources.source import Source, StampedReader


class SourceStamps(Header):
    """Names, sizes and times of change of the files from which a set is made."""

    max_bytes: ClassVar[int] = 2**31

    format: Literal[1] = 1
    images: dict[str, tuple[int, int]]  # by the name of the image; the two numbers of `StampedReader.stamp`


@dataclass(frozen=True)
class _Comparison:
    """The comparison of source images whose stamps have changed with the images in the shards."""

    plan: Plan
    suspects: frozenset[int]

    def find_changed(self, number: int) -> list[int]:
        """Return the images of a shard that would be stored otherwise today; none if the shard must be made anyway."""
        shard = self.plan.shards[number]
        indices = [index for index in shard.indices if index in self.suspects]
        if not indices:
            return []
        path = shard_path(self.plan.out, shard.split, shard.number)
        try:
            with reading(path), zipfile.ZipFile(path) as archive:
                return list(self._differing(shard, indices, archive))
        except BadRequestError:
            return []

    def _differing(self, shard: Shard, indices: Sequence[int], archive: zipfile.ZipFile) -> Iterator[int]:
        index = read_index(archive)
        rejected = {name for name, _ in index["rejects"]}
        members = {source: member for member, source in index["sources"].items()}
        for image in indices:
            made = self.plan.make_image(shard, image, [])
            if isinstance(made, Reject):
                is_same = made.source in rejected
            else:
                is_same = made.source in members and archive.read(members[made.source]) == made.data
            if not is_same:
                yield image


def describe_differences(plan: Plan) -> str:
    """Return what differs between a plan and the one of the set in its folder, for an error message."""
    try:
        old: dict[str, Any] = json.loads((plan.out / PLAN).read_bytes())
        new: dict[str, Any] = json.loads(plan.encode())
        settings = sorted((old.keys() | new.keys()) - {"fingerprint", "images"})
        differing = [name for name in settings if old.get(name) != new.get(name)]
    except (ValueError, AttributeError, OSError, RecursionError):
        return f"its {PLAN} is damaged"
    changes = [f"{name} was {json.dumps(old.get(name))} and is {json.dumps(new.get(name))}" for name in differing]
    recorded = _read_stamps(plan)
    if recorded is not None and recorded.images:
        changes += _name_changes(recorded.images, plan.source)
    elif old.get("images") != new["images"]:
        changes.append(f"it was made from {old.get('images')} images, and the source has {new['images']}")
    return "; ".join(changes) or "the split, the classes or the labels differ"


def check_source(plan: Plan, workers: int, console: Console) -> str:
    """Refuse a set of which source images have been replaced since it was made, and record those of a new set.

    Sizes and times of change are compared first, and the content of the images where these differ.

    Args:
        plan: The plan of the set, which is in its folder.
        workers: Number of processes.
        console: Console for progress.

    Returns:
        What was compared, as the end of a sentence.

    Raises:
        BadRequestError: A source image has changed.
        FailureError: The record could not be written.
    """
    path = plan.out / SOURCES
    stamps = _stamps(plan.source)
    recorded = _read_stamps(plan)
    if stamps is None:
        return "names and settings were compared"
    if recorded is None:
        if plan.finished_shards():
            return "names and settings were compared; the times of change of the images are not recorded"
        digests.write_header(path, SourceStamps(images=stamps), concurrent=plan.is_shared)
        return "names and settings were compared"
    suspects = [index for index, name in enumerate(plan.source.names) if recorded.images.get(name) != stamps[name]]
    if not suspects:
        return "names, sizes and times of change of the images were compared"
    changed = _find_changed(_Comparison(plan, frozenset(suspects)), workers, console)
    if changed:
        message = (
            f"{len(changed)} of the {len(stamps)} images of {plan.source.location} have changed since {plan.out} was "
            f"prepared, such as {plan.source.names[changed[0]]}"
        )
        raise BadRequestError(
            message, f"Remove {plan.out} and run the same `movq prepare` again, or name a new folder."
        )
    digests.write_header(path, SourceStamps(images=stamps), concurrent=plan.is_shared)
    return f"names of the images were compared, and the content of {len(suspects)} of them"


def _find_changed(comparison: _Comparison, workers: int, console: Console) -> list[int]:
    shards = len(comparison.plan.shards)
    changed: list[int] = []
    with (
        results(comparison.find_changed, shards, workers) as found,
        console.progress(shards, "comparing with the source", "shards") as progress,
    ):
        for _, indices in found:
            changed += indices
            progress.advance()
    return sorted(changed)


def _name_changes(recorded: Mapping[str, object], source: Source) -> list[str]:
    """Return the sentences about images that the source did not have, or no longer has."""
    names = set(source.names)
    added, removed = sorted(names - recorded.keys()), sorted(recorded.keys() - names)
    changes = [f"{len(added)} images were added, such as {added[0]}"] if added else []
    return changes + ([f"{len(removed)} images were removed, such as {removed[0]}"] if removed else [])


def _stamps(source: Source) -> dict[str, tuple[int, int]] | None:
    """Return the stamp of each image by its name; None if the source has none."""
    reader = source.reader
    if not isinstance(reader, StampedReader):
        return None
    return {name: reader.stamp(member) for name, member in zip(source.names, source.members, strict=True)}


def _read_stamps(plan: Plan) -> SourceStamps | None:
    """Return what is recorded of the source images, nothing if the record is damaged; None if it is missing."""
    try:
        return digests.read_header(plan.out / SOURCES, SourceStamps, "")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except BadRequestError:
        return SourceStamps(images={})  # Then the content of every image is compared, and the record is written again.
