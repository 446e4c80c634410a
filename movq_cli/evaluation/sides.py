"""The two sides of a comparison, and which metrics they allow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import paired, references
from movq_cli.evaluation.feature_cache import Reference
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.evaluation.metric import Metric, Needs
from movq_cli.evaluation.paired import Pairs
from movq_cli.evaluation.request import EvaluationRequest
from movq_cli.sources.original_names import original_names


@dataclass(frozen=True)
class Sides:
    """The real and the fake images; a file of statistics may stand in place of the real ones."""

    fake: ImageSet
    real: ImageSet | None
    reference: Reference | None
    """Statistics of the real images; None where there are only images."""

    @classmethod
    def open(cls, first: str, second: str, request: EvaluationRequest, console: Console) -> Self:
        """Open both sides; no image is read yet.

        Args:
            first: Location of the real images, or of their statistics.
            second: Location of the fake images.
            request: The split, the crop, and what to do about corrupt images.
            console: Console for warnings.

        Raises:
            BadRequestError: A location holds no images.
        """
        reference = references.find_reference(first, request.cache)
        is_real_readable = reference is None or references.has_images(reference)
        real = open_images("real", first, request, console) if is_real_readable else None
        return cls(open_images("fake", second, request, console), real, reference)

    @property
    def with_images(self) -> list[ImageSet]:
        """The sides that have images, the real one first."""
        return [self.fake] if self.real is None else [self.real, self.fake]

    @cached_property
    def pairs(self) -> Pairs:
        """The pairs of images that have the same name.

        Raises:
            BadRequestError: There is no pair.
        """
        assert self.real is not None
        try:
            return paired.match(self.real.names, self.fake.names)
        except BadRequestError:
            # `movq reconstruct --source-names` names images as in the source from which a set was prepared.
            if (self.real.prepared is None) == (self.fake.prepared is None):
                raise
            with suppress(BadRequestError):
                return paired.match(_source_names(self.real), _source_names(self.fake))
            raise

    def check(self, metric: Metric) -> None:
        """Refuse a metric that these sides do not allow; no image is read yet.

        Raises:
            BadRequestError: There are statistics in place of the images that the metric needs, no pairs, or too few
                images.
        """
        if self.real is None and not _is_served_by_statistics(metric):
            assert self.reference is not None
            raise BadRequestError(f"{metric.key} needs real images, and {self.reference.path} holds their statistics")
        if metric.needs is Needs.PAIRS:
            metric.require_images(len(self.pairs.indices))
        else:
            metric.require_images(min(map(len, self.with_images)))

    def needs_real_features(self, metric: Metric) -> bool:
        """Return whether a metric of sets needs the features of the real images, not only their statistics."""
        if metric.needs is Needs.STATISTICS_AND_FAKE:
            return self.reference is None or metric.network != references.NETWORK
        return metric.needs is Needs.REAL_AND_FAKE


def open_images(role: str, location: str, request: EvaluationRequest, console: Console) -> ImageSet:
    """Open a set of images as the request says.

    Args:
        role: "real" or "fake".
        location: Location of the images.
        request: The split, the crop, the background, and what to do about corrupt images.
        console: Console for warnings.

    Raises:
        BadRequestError: There are no images.
    """
    return ImageSet(
        role,
        location,
        request.split,
        crop=request.crop,
        background=request.background,
        strict=request.strict,
        console=console,
    )


def require_effect(images: Sequence[ImageSet], request: EvaluationRequest) -> None:
    """Refuse a split or a background that the user has named if it would have no effect.

    Raises:
        BadRequestError: No set has splits, or all sets are prepared.
    """
    if request.requires_background and all(side.prepared is not None for side in images):
        locations = " and ".join(dict.fromkeys(side.location for side in images))
        problem = f"--background has no effect: {locations} had its transparent pixels replaced by movq prepare"
        raise BadRequestError(problem, "Leave --background out.")
    if request.requires_splits and all(side.split is None for side in images):
        locations = " nor ".join(side.location for side in images)
        verb = f"neither {locations} has" if len(images) > 1 else f"{locations} does not have"
        raise BadRequestError(f"--split has no effect: {verb} splits", "Leave --split out.")


def _source_names(images: ImageSet) -> Sequence[str]:
    """Return the names that the images of a prepared set had in their source; of other sets, the names of the images.

    Raises:
        BadRequestError: The names cannot be read.
    """
    return images.names if images.prepared is None else original_names(Path(images.location), images.names)


def _is_served_by_statistics(metric: Metric) -> bool:
    if metric.needs is Needs.STATISTICS_AND_FAKE:
        return metric.network == references.NETWORK
    return metric.needs is Needs.FAKE
