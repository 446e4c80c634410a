"""The reconstructions: lost colors, and checkerboards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from movq_cli.data import grids
from movq_cli.doctor.rule import FEWEST_VALIDATIONS, Symptom, again, rule
from movq_cli.run_history import RunHistory

_PALE, _GARISH = 0.85, 1.2
"""Saturation over that of the originals between which colors are right: trained tokenizers have 0.92 to 1.02."""

_CAST = 6.0
"""Error of the mean color, in levels of 256, from which people see a cast; trained tokenizers have 0.5 to 3."""

_PROGRESS = 0.1
"""Share of the error that has to go between the middle and the end of the validations: then the colors are still
being learned."""

_PEAK = 12.0
"""Power of the error at the period of a checkerboard over that of its neighbours; noise and texture have 0.2 to 4."""

_PERIODS = (2, 4)
"""Periods of checkerboards, pixels: those of the last two upsamplings. Longer ones are mixed up with the blocks of JPEG
images."""

_VISIBLE = 1.0
"""Amplitude of a checkerboard from which it counts, levels of 256."""


def _color(history: RunHistory) -> Symptom | None:
    saturation, error = (history.series(name, "validation") for name in ("saturation", "color_error"))
    texts = []
    if len(saturation) >= FEWEST_VALIDATIONS:
        value, middle = saturation.values[-1], saturation.values[len(saturation) // 2]
        stays = abs(1 - value) > (1 - _PROGRESS) * abs(1 - middle)
        if stays and not _PALE <= value <= _GARISH:
            texts.append(f"the reconstructions have {value:.2f} times the saturation of the originals")
    if len(error) >= FEWEST_VALIDATIONS:
        value, middle = error.values[-1], error.values[len(error) // 2]
        if value > _CAST and value > (1 - _PROGRESS) * middle:
            texts.append(f"the mean color of an image is wrong by {value:.1f} of 256 levels")
    if not texts:
        return None
    step = max(series.steps[-1] for series in (saturation, error) if len(series))
    groups, widths = history.manifest.settings.vq.norm_groups, history.manifest.settings.vq.widths
    is_narrow = min(widths) < 4 * groups  # Groups of few channels lose their means, and with them colors.
    setting = f"vq.norm_groups={max(1, groups // 4)}" if is_narrow else "train_vq.l2_weight=1"
    picture = history.run.picture(history.pictures[-1]) if history.pictures else None
    return Symptom(f"At step {step:,} {' and '.join(texts)}.", again(history, setting), step, picture)


COLOR = rule(
    "colors-lost",
    "Colors or brightness are lost",
    "People see a cast of six levels and a loss of a seventh of the saturation; PSNR and LPIPS hardly do.",
    "vq",
)(_color)


def _checkerboard(history: RunHistory) -> Symptom | None:
    if len(history.pictures) < FEWEST_VALIDATIONS:
        return None
    step = history.pictures[-1]
    path = history.run.picture(step)
    try:
        grid, tiles = grids.read(path)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if grid.rows < 2:
        return None
    originals, images = tiles[: grid.columns], tiles[grid.columns : 2 * grid.columns]
    period, ratio, amplitude = max(
        ((period, *_peak(images, originals, period)) for period in _PERIODS), key=lambda found: found[1]
    )
    if ratio < _PEAK or amplitude < _VISIBLE:
        return None
    text = (
        f"In the picture of step {step:,} the errors repeat every {period} pixels with an amplitude of {amplitude:.1f} "
        f"levels, {ratio:.0f} times as strong as at the periods beside it."
    )
    train = history.manifest.settings.train_vq
    setting = f"train_vq.adversarial_weight={train.adversarial_weight / 4:g}"
    if train.adversarial_weight == 0:
        setting = "train_vq.l2_weight=1"
    return Symptom(text, again(history, setting), step, path)


def _peak(images: NDArray[np.uint8], originals: NDArray[np.uint8], period: int) -> tuple[float, float]:
    """Return how strongly the error repeats with a period: over its neighbouring frequencies, and its amplitude."""
    error = (images.astype(np.float64) - originals).mean(-1)
    error -= error.mean((1, 2), keepdims=True)
    ratios, amplitudes = [], []
    for axis in (1, 2):
        size = error.shape[axis]
        if size % period or size // period < 4:
            continue
        # The phase of a checkerboard is the same everywhere, so that it remains in the mean over rows or columns.
        spectrum = np.abs(np.fft.rfft(error.mean(3 - axis), axis=1)) ** 2
        power = spectrum.mean(0)
        at = size // period
        beside = [power[index] for index in range(at - 3, at + 4) if index != at and 0 < index < len(power)]
        ratios.append(power[at] / max(float(np.median(beside)), 1e-9))
        amplitudes.append(float(np.sqrt(power[at])) / size * (1 if period == 2 else 2))
    if not ratios:
        return 0.0, 0.0
    best = int(np.argmax(ratios))
    return ratios[best], amplitudes[best]


CHECKERBOARD = rule(
    "checkerboard",
    "The reconstructions have checkerboards",
    "Upsampling repeats its errors with its own period; the errors of texture have no period.",
    "vq",
)(_checkerboard)
