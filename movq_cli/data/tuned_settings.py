"""The settings of sampling that a search found for a prior: a JSON file beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from movq_cli import digests
from movq_cli.console import Console
from movq_cli.digests import Header
from movq_cli.version import __version__

REMEDY = "Remove it, and run `movq sample --tune` again, or add --preset-settings."
"""Sentence for errors: what to do about a damaged file."""

SEARCH = "tuning"
"""Name of the folder of the search in a run folder."""

JOURNAL = "trials.journal"
"""Name of optuna's journal in the folder of a search."""

JOURNAL_REMEDY = "Remove it: the search then begins again."
"""Sentence for errors: what to do about a damaged journal."""


class TunedSettings(Header):
    """The result of `movq sample --tune`."""

    prior: str
    """SHA-256 of the weight file for which the settings were found."""
    is_better: bool
    """Whether the best settings differ from the preset's by more than the spread between seeds; otherwise
    `movq sample` uses the preset's."""
    best: dict[str, Any]
    """The best settings that were found, by name; the others are the preset's."""
    preset: dict[str, Any]
    """The preset's values of the same settings."""
    fixed: dict[str, Any]
    """Values that were fixed during the search, by name; `movq sample` uses the best settings only beside these."""
    min_recall: float | None = None
    """Lowest recall of a search for the highest precision; None = the search was for the lowest FID."""
    best_fids: tuple[float, ...] = ()
    """FID of the best settings with each of the other seeds; empty if they were not compared with the preset's, and
    in a search for precision."""
    preset_fids: tuple[float, ...] = ()
    """FID of the preset's settings with the same seeds."""
    best_precisions: tuple[float, ...] = ()
    """Precision of the best settings with each of the other seeds, in a search for precision."""
    preset_precisions: tuple[float, ...] = ()
    """Precision of the preset's settings with the same seeds."""
    best_recalls: tuple[float, ...] = ()
    """Recall of the best settings with each of the other seeds, in a search for precision."""
    preset_recalls: tuple[float, ...] = ()
    """Recall of the preset's settings with the same seeds."""
    best_seconds: float
    """Time of sampling with the best settings, seconds an image."""
    preset_seconds: float
    """Time of sampling with the preset's settings, seconds an image."""
    trials: int
    """Number of settings that were tried."""
    images: int
    """Number of images of each trial."""
    seed: int
    """Random seed of the search and of the first image."""
    against: str
    """Location of the real images, or of their statistics."""
    split: str | None
    """Split of the real images; None for a set without splits."""
    inception: str
    """SHA-256 of Inception's weights."""
    device: str
    """Device of the search, on which the times depend."""
    date: str
    """Time of the result in UTC, in ISO 8601."""
    version: str = __version__
    """Version of movq that wrote the file."""

    @property
    def goal(self) -> str:
        """The goal of the search, in words."""
        if self.min_recall is None:
            return "the lowest FID"
        return f"the highest precision at a recall of at least {self.min_recall:g}"

    def repeats(self, whose: Literal["best", "preset"]) -> list[dict[str, float]]:
        """Return the metrics of the best settings or of the preset's with each of the other seeds, by name."""
        names = ("fid",) if self.min_recall is None else ("precision", "recall")
        values = [getattr(self, f"{whose}_{name}s") for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def path_beside(weights: Path) -> Path:
    """Return the path of the tuned settings of a weight file."""
    return weights.with_name(f"{weights.stem}-tuned.json")


def find(weights: Path, digest: str, console: Console) -> TunedSettings | None:
    """Return the tuned settings of a weight file, if there are some that are better than the preset's.

    Args:
        weights: Weight file of the prior.
        digest: SHA-256 of this file.
        console: Console for a warning if the settings were found for other weights.

    Raises:
        BadRequestError: The file is damaged.
    """
    path = path_beside(weights)
    try:
        tuned = digests.read_header(path, TunedSettings, REMEDY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if tuned.prior != digest:
        console.warn(
            f"{path} was found for other weights, and is not used: run `movq sample --tune` again, or remove the file"
        )
        return None
    return tuned if tuned.is_better else None


def write(weights: Path, tuned: TunedSettings) -> Path:
    """Write tuned settings beside a weight file, and return the path of their file.

    Raises:
        FailureError: The file cannot be written.
    """
    digests.write_header(path_beside(weights), tuned)
    return path_beside(weights)
