"""How near reconstructions are to their originals: the pairs, and PSNR, SSIM and LPIPS of each.

Each name has many readings. The same four images give SSIM 0.741 in the one used here, 0.688 with
scikit-image's defaults and 0.667 with torchmetrics', so every report carries the variant's name.

Shapes: N images, H x W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from movq_cli.data import pixels
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import extractors
from movq_cli.evaluation.extractors import LPIPS, Trunk


class Pairs(NamedTuple):
    """Which image of one set belongs to which of another."""

    places: list[tuple[int, int]]  # (first, second), in order of their names
    unpaired: tuple[list[str], list[str]]  # the names on either side that have no partner


class PairedMetric(NamedTuple):
    """A figure of each pair of images, with what a report must say of it."""

    key: str
    variant: str
    smallest_side: int  # pixels
    score: Callable[[Tensor, Tensor], Tensor]  # two uint8 [N, 3, H, W] in [0, 255] -> [N]
    trunk: Trunk | None = None  # whose pretrained weights it needs


PSNR_VARIANT = "RGB in [0,1], one value an image, mean over images"
SSIM_VARIANT = "uniform 11x11 window, RGB in [0,1], one value an image, mean over images"

SSIM_WINDOW = 11
"""Pixels a side; no image may be smaller."""

# Wang et al. 2004, equation 13, for a data range of 1.
_C1 = 0.01**2
_C2 = 0.03**2


def match(first: Sequence[str], second: Sequence[str]) -> Pairs:
    """Pair images whose relative names are equal but for the suffix.

    Of two images in a set that only their suffixes tell apart, a.jpg and a.png, each belongs to the one whose
    name is the same with it (a.jpg), or goes on after it (a.jpg.png, as `movq reconstruct` calls it).

    Raises:
        BadRequestError: There is no pair.
    """
    a, b = _places(first), _places(second)
    both = sorted(a.keys() & b.keys())
    if not both:
        raise BadRequestError(
            f"no image of the one set has a partner in the other ({first[0]} here, {second[0]} there)",
            "PSNR, SSIM and LPIPS compare images of the same relative name, suffix aside.",
        )
    unpaired_a, unpaired_b = a.keys() - b.keys(), b.keys() - a.keys()
    return Pairs(
        [(a[stem], b[stem]) for stem in both],
        (sorted(first[a[stem]] for stem in unpaired_a), sorted(second[b[stem]] for stem in unpaired_b)),
    )


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio over all pixels and channels of each image.

    Args:
        a: Images [N, 3, H, W], uint8 in [0, 255] or float in [0, 1].
        b: Their counterparts, of the same shape.

    Returns:
        Decibels [N], float64. Identical images give inf: it is for the caller to keep them out of a mean.

    Raises:
        ValueError: The shapes differ.
    """
    a, b = _unit_range(a, b)
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) with a uniform window and the sample covariance.

    It equals scikit-image's `structural_similarity(win_size=11, channel_axis=-1, data_range=1.0)`: the mean
    over the windows that lie inside the image, then over channels.

    Args:
        a: Images [N, 3, H, W], uint8 in [0, 255] or float in [0, 1]; H and W at least 11.
        b: Their counterparts, of the same shape.

    Returns:
        Similarities [N] in [-1, 1], float64; 1 for identical images.

    Raises:
        ValueError: The shapes differ, or the images are smaller than the window.
    """
    a, b = _unit_range(a, b)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels")
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    variance_a = unbiased * (_window_mean(a * a) - mean_a**2)
    variance_b = unbiased * (_window_mean(b * b) - mean_b**2)
    covariance = unbiased * (_window_mean(a * b) - mean_a * mean_b)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def finite_mean(scores: Tensor) -> float | None:
    """The mean of the finite ones of scores [N]; None where there are none.

    Identical images have an infinite PSNR: one would swallow the mean, and a cap would be a number nobody measured.
    """
    finite = scores[scores.isfinite()]
    return finite.mean().item() if len(finite) else None


PSNR = PairedMetric("psnr", PSNR_VARIANT, 1, psnr)
SSIM = PairedMetric("ssim", SSIM_VARIANT, SSIM_WINDOW, ssim)


def load_metrics(keys: Container[str], folder: Path | None, device: torch.device) -> list[PairedMetric]:
    """The metrics of these names, LPIPS with its network.

    LPIPS is read with AlexNet's trunk, the usual one for figures; with VGG's where AlexNet's weights are not
    on this machine; and with both where both are, VGG's then as `lpips_vgg`. Their scales differ, so each
    variant names its trunk.

    Args:
        keys: Among "psnr", "ssim" and "lpips".
        folder: Searched for weights before torch hub's.
        device: Where the networks run.

    Raises:
        BadRequestError: LPIPS's weights are missing or unusable.
    """
    metrics = [metric for metric in (PSNR, SSIM) if metric.key in keys]
    if "lpips" not in keys:
        return metrics
    trunks = extractors.available_trunks(folder) or ["alex"]
    for trunk in trunks:
        score = partial(_perceptual_distance, extractors.load_lpips(trunk, folder, device))
        key = "lpips" if trunk == trunks[0] else f"lpips_{trunk}"
        variant = f"{trunk} trunk, version 0.1, mean over images"
        metrics.append(PairedMetric(key, variant, extractors.SMALLEST_SIDE[trunk], score, trunk))
    return metrics


def score_pairs(
    metrics: Sequence[PairedMetric], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> dict[str, list[float]]:
    """Every metric's value for every pair that is large enough for it.

    Args:
        metrics: What to compute.
        batches: The places of the pairs [B] and their images, uint8 [B, 2, 3, H, W].
        device: Where it is computed.
    """
    scores: dict[str, list[float]] = {metric.key: [] for metric in metrics}
    for _, images in batches:
        a, b = images.to(device).unbind(dim=1)
        for metric in metrics:
            if min(a.shape[-2:]) >= metric.smallest_side:
                scores[metric.key] += metric.score(a, b).tolist()
    return scores


def _places(names: Sequence[str]) -> dict[str, int]:
    """Each image's place by its name without suffix; with it where two images share the rest."""
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    shared = {stem for stem, count in Counter(stems).items() if count > 1}
    keys = [name if stem in shared else stem for name, stem in zip(names, stems, strict=True)]
    return {key: place for place, key in enumerate(keys)}


def _perceptual_distance(network: LPIPS, a: Tensor, b: Tensor) -> Tensor:
    distance: Tensor = network(pixels.to_signed(a), pixels.to_signed(b))
    return distance.flatten()


def _unit_range(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in [0, 1] and float64: SSIM subtracts nearly equal squares, which float32 does not survive."""
    if a.shape != b.shape:
        raise ValueError(f"paired images must have one shape, not {list(a.shape)} and {list(b.shape)}")
    scaled = [x.double() / 255 if x.dtype == torch.uint8 else x.double() for x in (a, b)]
    return scaled[0], scaled[1]


def _window_mean(x: Tensor) -> Tensor:
    # A uniform window is separable: 22 additions a pixel in place of 121.
    rows = F.avg_pool2d(x, (SSIM_WINDOW, 1), stride=1)
    return F.avg_pool2d(rows, (1, SSIM_WINDOW), stride=1)
