"""The picture of a search for settings of sampling: FID against the time of an image."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from movq_cli.commands.trials import Measured
from movq_cli.data.tuned_settings import TunedSettings
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write


def require_matplotlib() -> None:
    """Check that the picture can be drawn.

    Raises:
        BadRequestError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise BadRequestError("--tune needs matplotlib", "Install it: pip install 'movq[tune]'.") from None


def frontier(trials: Sequence[Measured]) -> list[Measured]:
    """Return the trials to which no other one is better in both FID and time, the fastest first."""
    found: list[Measured] = []
    for trial in sorted(trials, key=lambda trial: (trial.seconds, trial.fid)):
        if not found or trial.fid < found[-1].fid:
            found.append(trial)
    return found


def save(path: Path, trials: Sequence[Measured], tuned: TunedSettings) -> None:
    """Draw all trials, the best trade of FID and time, and the means with other seeds with their spread.

    Args:
        path: Path of the PNG file.
        trials: The trials, the first of them with the preset's settings.
        tuned: The result of the search.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(
        [1000 * trial.seconds for trial in trials], [trial.fid for trial in trials], color="0.6", label="trial"
    )
    best = frontier(trials)
    axes.step(
        [1000 * trial.seconds for trial in best],
        [trial.fid for trial in best],
        where="post",
        label="lowest FID within a time",
    )
    compared = {
        "best settings": (tuned.best_seconds, tuned.best_fids),
        "preset's settings": (tuned.preset_seconds, tuned.preset_fids),
    }
    for (name, (seconds, fids)), marker in zip(compared.items(), ("*", "s"), strict=True):
        if fids:
            axes.errorbar(
                1000 * seconds,
                statistics.mean(fids),
                statistics.stdev(fids),
                fmt=marker,
                markersize=11,
                capsize=4,
                label=f"{name}, {len(fids)} other seeds",
            )
    if not tuned.preset_fids:
        axes.plot(1000 * trials[0].seconds, trials[0].fid, "s", markersize=11, label="preset's settings")
    axes.set_xlabel(f"milliseconds an image ({tuned.device})")
    axes.set_ylabel(f"FID of {tuned.images:,} images")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())
