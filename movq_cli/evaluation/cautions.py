"""Where figures would mislead: what a report must say of the sets that it compares, a line each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

from movq_cli.data.images import FILTER
from movq_cli.data.sample_files import MANIFEST
from movq_cli.evaluation.image_sets import ImageSet, Size

RELIABLE_FID = 2048
"""Images: fewer leave the covariance of 2,048 features short of full rank."""

_UNEVEN = 0.02
"""Of the images, that are of other classes on one side than on the other."""

_SHOWN = 3  # names in a line


def before(sides: Sequence[ImageSet], metrics: Container[str], *, paired: bool) -> Iterator[str]:
    """What can be said before the work begins.

    Args:
        sides: Those that have images, real first.
        metrics: What will be computed.
        paired: Whether fakes bear the names of their originals.
    """
    for side in sides:
        if "fid" in metrics and len(side) < RELIABLE_FID:
            few = f"{side.role} has {len(side)} images, fewer than {RELIABLE_FID}"
            yield f"{few}: FID is biased upwards and compares only at equal counts"
    if len(sides) < 2:
        return
    real, fake = sides
    if Path(real.location).resolve() == Path(fake.location).resolve():
        yield f"both sides are the same images: {fake.location}"
    jpeg = [side.role for side in sides if side.names[0].lower().endswith((".jpg", ".jpeg"))]
    if len(jpeg) == 1:
        yield f"only the {jpeg[0]} images are JPEG: the figures see its artefacts"
    filters = {side.role: side.prepared.filter for side in sides if side.prepared is not None}
    if len(set(filters.values())) > 1:
        yield f"the sides were resized with different filters ({_listed(filters)}), which moves FID by a whole point"
    if paired and real.split == "train" and "fid" in metrics:
        yield f"{real.location} is its train split: a tokenizer's rFID is that of images which it has not seen"
    yield from _of_classes(real, fake)


def after(sides: Sequence[ImageSet]) -> Iterator[str]:
    """What the images themselves have told: sizes, and what was done about them."""
    sizes = {side.role: Counter(side.sizes.values()) for side in sides}
    looked_at = {side.role: _looked_at(side, sizes[side.role]) for side in sides}
    if len(set().union(*looked_at.values())) > 1:
        seen = "; ".join(f"{role}: {examples(sorted(names))}" for role, names in looked_at.items() if names)
        cure = "" if any(side.crop for side in sides) else "; --crop SIDE takes central squares of one size"
        yield f"images of several sizes ({seen}): the figures depend on how each is resized{cure}"
    for side in sides:
        if side.crop is None:
            continue
        resized = sum(count for size, count in sizes[side.role].items() if min(size) != side.crop)
        enlarged = sum(count for size, count in sizes[side.role].items() if min(size) < side.crop)
        if resized:
            more = f", {enlarged} of them enlarged" if enlarged else ""
            yield (
                f"{resized} of {len(side)} {side.role} images were resized here to {side.crop} pixels ({FILTER})"
                f"{more}: FID depends on the filter"
            )


def examples(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _looked_at(side: ImageSet, sizes: Counter[Size]) -> set[str]:
    if side.crop is not None:
        return {f"{side.crop}x{side.crop}"}
    return {f"{size.width}x{size.height}" for size in sizes}


def _of_classes(real: ImageSet, fake: ImageSet) -> Iterator[str]:
    shares = {side.role: _class_shares(side) for side in (real, fake)}
    if not all(shares.values()):
        return
    names = shares["real"].keys() | shares["fake"].keys()
    excess = {name: shares["fake"].get(name, 0.0) - shares["real"].get(name, 0.0) for name in names}
    if sum(map(abs, excess.values())) / 2 > _UNEVEN:
        most = max(sorted(excess), key=lambda name: abs(excess[name]))
        parts = _listed({role: f"{share.get(most, 0.0):.1%}" for role, share in shares.items()})
        yield f"the classes are not spread alike (of {most}, {parts}): FID sees that too"


def _class_shares(side: ImageSet) -> dict[str, float]:
    """The share of each class, by its name; empty where classes are not known."""
    source = side.source
    found: Sequence[str] = ()
    if source.labels is not None:
        found = [source.classes[label] for label in source.labels]
    elif (manifest := Path(side.location) / MANIFEST).is_file():
        found = _drawn_classes(manifest)
    counts = Counter(found)
    return {name: count / len(found) for name, count in counts.items()}


def _drawn_classes(manifest: Path) -> list[str]:
    """The classes of samples, from the manifest beside them."""
    try:
        images = json.loads(manifest.read_text(encoding="utf-8"))["images"]
        return [str(image["class"]) for image in images if image["class"] is not None]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
