"""The objective of a search for settings of sampling: the lowest FID, or the highest precision at a recall."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

Metrics = Mapping[str, float]
"""Values of the metrics of some images, by result key of `movq evaluate`."""


class Objective(ABC):
    """The objective of a search."""

    metric: ClassVar[str]
    """Result key of the metric that is optimized."""
    direction: ClassVar[Literal["minimize", "maximize"]]
    names: ClassVar[Mapping[str, str]]
    """Names of the measured metrics by result key, those of tables and pictures."""
    candidates: ClassVar[int] = 1
    """Number of trials, at most, that are compared with the preset's settings by other seeds."""

    def violation(self, metrics: Metrics) -> float:
        """Return by how much metrics violate the constraint of the search; at most 0 if they do not."""
        del metrics
        return 0.0

    def order(self, metrics: Metrics) -> tuple[float, float]:
        """Return the key by which trials are sorted, the best first; those that violate the constraint come last."""
        value = metrics[self.metric]
        return max(0.0, self.violation(metrics)), value if self.direction == "minimize" else -value

    def is_met(self, repeats: Sequence[Metrics]) -> bool:
        """Return whether the means over several seeds meet the constraint."""
        return self.violation(means(repeats)) <= 0

    @abstractmethod
    def is_better(self, best: Sequence[Metrics], preset: Sequence[Metrics]) -> bool:
        """Return whether settings are better than the preset's by more than the spread between seeds.

        Args:
            best: Metrics of the settings with each of several seeds.
            preset: Metrics of the preset's settings with the same seeds.
        """

    @abstractmethod
    def nothing_found(self, closest: Metrics) -> str:
        """Return the beginning of a sentence for a search in which no trial is better than the preset's settings.

        Args:
            closest: Metrics of the first trial by `order`.
        """

    def not_better(self, best: Sequence[Metrics]) -> str:
        """Return a clause that says why settings did not replace the preset's.

        Args:
            best: Metrics of the settings with each of several seeds.
        """
        del best
        return "that is no gain beyond the spread between seeds"

    def describe(self, metrics: Metrics) -> dict[str, str]:
        """Return the values of the metrics as text, by name."""
        return {name: f"{metrics[key]:.4g}" for key, name in self.names.items()}

    def describe_spread(self, repeats: Sequence[Metrics]) -> str:
        """Return the mean and the standard deviation of each metric over several seeds."""
        mean, spread = means(repeats), spreads(repeats)
        return " at ".join(f"{name} {mean[key]:.4g} ± {spread[key]:.2g}" for key, name in self.names.items())


@dataclass(frozen=True)
class LowestFID(Objective):
    """The lowest FID."""

    metric = "fid"
    direction = "minimize"
    names: ClassVar[Mapping[str, str]] = {"fid": "FID"}

    def is_better(self, best: Sequence[Metrics], preset: Sequence[Metrics]) -> bool:
        """Return whether the mean FID is lower by more than the spread."""
        return is_beyond_spread(values_of(best, "fid"), values_of(preset, "fid"))

    def nothing_found(self, closest: Metrics) -> str:
        """Return that no FID is lower."""
        del closest
        return "no settings had a lower FID than the preset's, which stay in use"


@dataclass(frozen=True)
class PrecisionAtRecall(Objective):
    """The highest precision of the settings whose recall is high enough.

    Args:
        min_recall: The lowest recall, in [0, 1].
    """

    min_recall: float

    metric = "precision"
    direction = "maximize"
    names: ClassVar[Mapping[str, str]] = {"precision": "precision", "recall": "recall"}
    # The best trials lie near the lowest recall, and some of them had it by the luck of their seed only.
    candidates = 3

    def violation(self, metrics: Metrics) -> float:
        """Return by how much the recall is too low."""
        return self.min_recall - metrics["recall"]

    def is_better(self, best: Sequence[Metrics], preset: Sequence[Metrics]) -> bool:
        """Return whether the mean recall is high enough, and that or the mean precision is a gain beyond the spread.

        If the preset's recall is high enough as well, only the precision counts.
        """
        if not self.is_met(best):
            return False
        counted = ("precision",) if self.is_met(preset) else ("precision", "recall")
        return any(is_beyond_spread(values_of(preset, key), values_of(best, key)) for key in counted)

    def nothing_found(self, closest: Metrics) -> str:
        """Return that no recall is high enough, or that no precision is higher."""
        if self.violation(closest) > 0:
            return (
                f"no settings had a recall of {self.min_recall:g}, the highest one was {closest['recall']:.4g}, and "
                "the preset's settings stay in use: lower --min-recall, or raise --budget"
            )
        return (
            f"no settings with a recall of at least {self.min_recall:g} had a higher precision than the preset's, "
            "which stay in use"
        )

    def not_better(self, best: Sequence[Metrics]) -> str:
        """Return that the recall is too low with other seeds, or that there is no gain beyond the spread."""
        if self.is_met(best):
            return super().not_better(best)
        return f"that recall is below {self.min_recall:g}"


def values_of(repeats: Sequence[Metrics], key: str) -> list[float]:
    """Return the values of one metric."""
    return [metrics[key] for metrics in repeats]


def means(repeats: Sequence[Metrics]) -> dict[str, float]:
    """Return the mean of each metric."""
    return {key: statistics.mean(values_of(repeats, key)) for key in repeats[0]}


def spreads(repeats: Sequence[Metrics]) -> dict[str, float]:
    """Return the standard deviation of each metric."""
    return {key: statistics.stdev(values_of(repeats, key)) for key in repeats[0]}


def is_beyond_spread(lower: Sequence[float], higher: Sequence[float]) -> bool:
    """Return whether the mean of some values is lower than that of others by more than the spread of a difference.

    The spread is the standard deviation of the difference of one value of each, so that the means differ by several
    times their own standard error.
    """
    spread = (statistics.variance(lower) + statistics.variance(higher)) ** 0.5
    return statistics.mean(higher) - statistics.mean(lower) > spread
