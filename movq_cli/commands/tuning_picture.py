"""The picture of a search for settings of sampling: FID against the time of an image, or precision against recall."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from movq_cli.commands.trials import Measured
from movq_cli.commands.tuning_objectives import Metrics
from movq_cli.data.tuned_settings import TunedSettings
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]
"""Coordinates of a trial in the picture, x and y."""


def require_matplotlib() -> None:
    """Check that the picture can be drawn.

    Raises:
        BadRequestError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise BadRequestError("--tune needs matplotlib", "Install it: pip install 'movq[tune]'.") from None


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points to which no other one is better in both coordinates, of which less is better; by their x."""
    found: list[Point] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def title(tuned: TunedSettings) -> str:
    """Return what the picture shows."""
    return "FID against time" if tuned.min_recall is None else "precision against recall"


def save(path: Path, trials: Sequence[Measured], tuned: TunedSettings) -> None:
    """Draw all trials, the best trade of both axes, and the means with other seeds with their spread.

    Args:
        path: Path of the PNG file.
        trials: The trials, the first of them with the preset's settings.
        tuned: The result of the search.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    time_label = f"milliseconds an image ({tuned.device})"
    points = [_point(trial.metrics, trial.seconds) for trial in trials]
    if tuned.min_recall is None:
        axes.scatter(*_coordinates(points), color="0.6", label="trial")
        axes.step(*_coordinates(frontier(points)), where="post", label="lowest FID within a time")
        axes.set(xlabel=time_label, ylabel=f"FID of {tuned.images:,} images")
    else:
        times = [1000 * trial.seconds for trial in trials]
        dots = axes.scatter(*_coordinates(points), c=times, cmap="viridis_r", label="trial")
        figure.colorbar(dots, label=time_label)
        best = [(-x, -y) for x, y in frontier([(-x, -y) for x, y in points])]  # More of both is better.
        axes.step(*_coordinates(best), where="post", label="highest precision from a recall on")
        axes.axvline(tuned.min_recall, color="0.3", linestyle="--", label="lowest recall of the search")
        axes.set(xlabel=f"recall of {tuned.images:,} images", ylabel="precision")
    _draw_means(axes, "*", "best settings", tuned.repeats("best"), tuned.best_seconds)
    _draw_means(axes, "s", "preset's settings", tuned.repeats("preset"), tuned.preset_seconds)
    if not tuned.repeats("preset"):
        axes.plot(*points[0], "s", markersize=11, label="preset's settings")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())


def _point(metrics: Metrics, seconds: float) -> Point:
    """Return the coordinates of what was measured: time and FID, or recall and precision."""
    return (1000 * seconds, metrics["fid"]) if "fid" in metrics else (metrics["recall"], metrics["precision"])


def _coordinates(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Return all x and all y."""
    return [x for x, _ in points], [y for _, y in points]


def _draw_means(axes: Axes, marker: str, name: str, repeats: Sequence[Metrics], seconds: float) -> None:
    """Draw the mean and the standard deviation over other seeds; nothing without them."""
    if not repeats:
        return
    x, y = _coordinates([_point(metrics, seconds) for metrics in repeats])
    axes.errorbar(
        statistics.mean(x),
        statistics.mean(y),
        statistics.stdev(y),
        statistics.stdev(x) or None,  # The time of an image is one number.
        fmt=marker,
        markersize=11,
        capsize=4,
        label=f"{name}, {len(repeats)} other seeds",
    )
