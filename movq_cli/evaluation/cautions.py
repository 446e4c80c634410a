"""Warnings of what makes metrics misleading, one line for each reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from movq_cli.data.filters import FILTER
from movq_cli.data.images import Traits, covering_size
from movq_cli.evaluation.image_sets import ImageSet, Size
from movq_cli.evaluation.metric import Metric, Needs
from movq_cli.image_size import ImageSize

_CLASS_TOLERANCE = 0.02
"""Share of the images that may have another class on one side than on the other without a warning."""

_JPEG_TOLERANCE = 0.1
"""Share of the images that may be JPEG on one side and not on the other without a warning."""

_SHOWN_NAMES = 3


def before(sides: Sequence[ImageSet], metrics: Sequence[Metric]) -> Iterator[str]:
    """Yield the warnings that are known before an image is read.

    Args:
        sides: Sets that have images, the real one first.
        metrics: Metrics that will be computed.
    """
    reconstructed = any(metric.needs is Needs.PAIRS for metric in metrics)
    for metric in metrics:
        yield from metric.warnings(sides, reconstructed=reconstructed)
    if len(sides) < 2:
        return
    real, fake = sides
    if Path(real.location).resolve() == Path(fake.location).resolve():
        yield f"both sides are the same images: {fake.location}"
    filters = {side.role: side.prepared.filter for side in sides if side.prepared is not None}
    if len(set(filters.values())) > 1:
        yield f"the sides were resized with different filters ({_listed(filters)}), which changes FID by a whole point"
    yield from _warn_of_policies(real, fake)
    yield from _warn_of_classes(real, fake)


def after(sides: Sequence[ImageSet]) -> Iterator[str]:
    """Yield the warnings that are known once the images have been read: their formats and sizes, and the resizing.

    Args:
        sides: Sets that have images, the real one first.
    """
    yield from _warn_of_jpeg(sides)
    sizes = {side.role: side.size_counts() for side in sides}
    compared = {side.role: _compared_sizes(side, sizes[side.role]) for side in sides}
    if len(set().union(*compared.values())) > 1:
        listed = "; ".join(f"{role}: {examples(sorted(names))}" for role, names in compared.items() if names)
        remedy = "" if any(side.crop for side in sides) else "; --crop takes central parts of one size"
        yield f"images of several sizes ({listed}): the metrics depend on how each is resized{remedy}"
    for side in sides:
        crop = side.crop
        if crop is None:
            continue
        stored = {ImageSize(size.height, size.width): number for size, number in sizes[side.role].items()}
        resized = sum(number for size, number in stored.items() if covering_size(size, crop) != size)
        enlarged = sum(number for size, number in stored.items() if not crop.fits_into(size))
        if resized:
            note = f", {enlarged} of them enlarged" if enlarged else ""
            yield (
                f"{resized} of {len(side)} {side.role} images were resized here to {crop.in_words} ({FILTER})"
                f"{note}: FID depends on the filter{_other_filter(sides, side)}"
            )


def examples(names: Sequence[str]) -> str:
    """Return the first three of some names as text, with an ellipsis if there are more."""
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")


def _other_filter(sides: Sequence[ImageSet], resized: ImageSet) -> str:
    """Return a remedy if another set than the one that is resized here was prepared with another filter."""
    for side in sides:
        if side is not resized and side.prepared is not None and side.prepared.filter != FILTER:
            return (
                f", and the {side.role} images were resized with {side.prepared.filter}: prepare the "
                f"{resized.role} images with `movq prepare --filter {side.prepared.filter}`"
            )
    return ""


def _warn_of_jpeg(sides: Sequence[ImageSet]) -> Iterator[str]:
    shares = {side.role: side.jpeg_share for side in sides}
    known = {role: share for role, share in shares.items() if share is not None}
    if len(known) < 2 or max(known.values()) - min(known.values()) <= _JPEG_TOLERANCE:
        return
    subject = f"only the {max(known, key=known.__getitem__)} images are JPEG"
    if min(known.values()) > 0 or max(known.values()) < 1:
        subject = f"the sides have different shares of JPEG images ({_listed(_percentages(known))})"
    yield f"{subject}: the metrics measure its artefacts too"


def _warn_of_policies(real: ImageSet, fake: ImageSet) -> Iterator[str]:
    """Warn of images that are decoded in one way on one side and in another way on the other side."""
    ours, theirs = real.policy, fake.policy
    if ours == theirs:
        return
    prepared = [side for side in (real, fake) if side.prepared is not None]
    # Two prepared sets do not say how many of their images this concerns.
    found = Traits(1, 1, 1) if len(prepared) == 2 else Traits(*map(max, real.count_traits(), fake.count_traits()))
    if ours.background != theirs.background and found.transparent:
        colors = {side.role: ",".join(map(str, side.policy.background)) for side in (real, fake)}
        other = ",".join(map(str, prepared[0].policy.background))
        remedy = "" if len(prepared) == 2 else f"; --background {other} makes them equal"
        yield f"the sides have different backgrounds behind transparent pixels ({_listed(colors)}){remedy}"
    if ours.orientation != theirs.orientation and found.turned:
        words = {side.role: "upright" if side.policy.orientation else "as stored" for side in (real, fake)}
        yield f"images with an orientation in their EXIF data are turned on one side only ({_listed(words)})"
    if ours.white != theirs.white and found.deep:
        whites = {side.role: str(side.policy.white) for side in (real, fake)}
        yield f"gray images of 16 bits have different values of white ({_listed(whites)})"


def _compared_sizes(side: ImageSet, sizes: Counter[Size]) -> set[str]:
    if side.crop is not None:
        return {f"{side.crop.width}x{side.crop.height}"}
    return {f"{size.width}x{size.height}" for size in sizes}


def _warn_of_classes(real: ImageSet, fake: ImageSet) -> Iterator[str]:
    shares = {side.role: _class_shares(side) for side in (real, fake)}
    if not all(shares.values()):
        return
    names = shares["real"].keys() | shares["fake"].keys()
    excess = {name: shares["fake"].get(name, 0.0) - shares["real"].get(name, 0.0) for name in names}
    # The total variation distance between the two distributions of classes.
    if sum(map(abs, excess.values())) / 2 > _CLASS_TOLERANCE:
        most = max(sorted(excess), key=lambda name: abs(excess[name]))
        parts = _listed(_percentages({role: share.get(most, 0.0) for role, share in shares.items()}))
        yield f"the sides have different shares of classes ({most}: {parts}), which changes FID too"


def _class_shares(side: ImageSet) -> dict[str, float]:
    """Return the share of each class by its name; nothing where the classes are unknown."""
    source = side.source
    labels = source.labels
    counts = side.sampled_classes if labels is None else Counter(source.classes[label] for label in labels)
    return {name: number / counts.total() for name, number in counts.items()}


def _percentages(shares: Mapping[str, float]) -> dict[str, str]:
    return {role: f"{share:.1%}" for role, share in shares.items()}


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
