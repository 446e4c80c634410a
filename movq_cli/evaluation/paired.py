"""Metrics of reconstructions against their originals: the pairing of images by name, PSNR, SSIM and LPIPS.

Each of these names stands for several definitions. The same four images have SSIM 0.741 by the definition used here,
0.688 with scikit-image's defaults and 0.667 with torchmetrics. Therefore every protocol names the variant.

Shapes: N pairs of images, H x W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from movq_cli.data import pixels
from movq_cli.errors import BadRequestError
from movq_cli.evaluation.extractors import LPIPS
from movq_cli.evaluation.pretrained import Network

# Constants of SSIM (Wang et al. 2004, equation 13) for values in [0, 1].
_C1 = 0.01**2
_C2 = 0.03**2


class Pairs(NamedTuple):
    """The images of two sets that have the same name."""

    indices: list[tuple[int, int]]  # index in the first and in the second set, in the order of names
    unpaired: tuple[list[str], list[str]]  # names in the first and in the second set without a partner


class PairScorer(NamedTuple):
    """A paired metric that is ready to score pairs, with its network loaded."""

    key: str  # result key
    variant: str  # definition, for the protocol
    smallest_side: int  # smallest height and width of an image, in pixels
    score: Callable[[Tensor, Tensor], Tensor]  # two uint8 tensors [N, 3, H, W] -> [N]
    network: Network | None = None  # pretrained network that it uses


def match(first: Sequence[str], second: Sequence[str]) -> Pairs:
    """Pair the images whose relative names are equal apart from the suffix.

    Where two images of a set differ in their suffix alone, such as a.jpg and a.png, the suffix is part of the name:
    a.jpg is then paired with a.jpg or with a.jpg.png, as `movq reconstruct` names its reconstruction.

    Args:
        first: Names of the first set.
        second: Names of the second set.

    Raises:
        BadRequestError: There is no pair.
    """
    a, b = _index_by_name(first), _index_by_name(second)
    both = sorted(a.keys() & b.keys())
    if not both:
        raise BadRequestError(
            f"no image of the first set has a partner in the second (the first has {first[0]}, the second {second[0]})",
            "Metrics of pairs compare images that have the same relative name, apart from the suffix.",
        )
    unpaired_a, unpaired_b = a.keys() - b.keys(), b.keys() - a.keys()
    return Pairs(
        [(a[name], b[name]) for name in both],
        (sorted(first[a[name]] for name in unpaired_a), sorted(second[b[name]] for name in unpaired_b)),
    )


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair, over all pixels and channels.

    Args:
        a: Images [N, 3, H, W], uint8 in [0, 255] or float in [0, 1].
        b: Their partners, of the same shape.

    Returns:
        Decibels [N], float64. Identical images give inf, which a mean must leave out (see `finite_mean`).

    Raises:
        ValueError: The shapes differ.
    """
    a, b = _to_unit_range(a, b)
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def ssim(a: Tensor, b: Tensor, window: int) -> Tensor:
    """Return the structural similarity (Wang et al. 2004) with a uniform window and the sample covariance.

    It equals scikit-image's `structural_similarity(win_size=window, channel_axis=-1, data_range=1.0)`: the mean over
    the windows that lie inside the image, then over the channels.

    Args:
        a: Images [N, 3, H, W], uint8 in [0, 255] or float in [0, 1]; H and W at least `window`.
        b: Their partners, of the same shape.
        window: Side of the window in pixels.

    Returns:
        Similarities [N] in [-1, 1], float64; 1 for identical images.

    Raises:
        ValueError: The shapes differ, or the images are smaller than the window.
    """
    a, b = _to_unit_range(a, b)
    if min(a.shape[-2:]) < window:
        raise ValueError(f"SSIM needs images of at least {window} x {window} pixels")
    mean_a, mean_b = _window_mean(a, window), _window_mean(b, window)
    unbiased = window**2 / (window**2 - 1)
    variance_a = unbiased * (_window_mean(a * a, window) - mean_a**2)
    variance_b = unbiased * (_window_mean(b * b, window) - mean_b**2)
    covariance = unbiased * (_window_mean(a * b, window) - mean_a * mean_b)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def perceptual_distance(network: LPIPS, a: Tensor, b: Tensor) -> Tensor:
    """Return the LPIPS distance of each pair [N].

    Args:
        network: Network that computes the distance.
        a: Images, uint8 [N, 3, H, W].
        b: Their partners, of the same shape.
    """
    distance: Tensor = network(pixels.to_signed(a), pixels.to_signed(b))
    return distance.flatten()


def finite_mean(scores: Tensor) -> float | None:
    """Return the mean of the finite scores; None where no score is finite.

    The PSNR of identical images is infinite. One such pair would make the mean infinite, and a cap would be an
    arbitrary number.

    Args:
        scores: Scores [N].
    """
    finite = scores[scores.isfinite()]
    return finite.mean().item() if len(finite) else None


def score_pairs(
    scorers: Sequence[PairScorer], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> dict[str, list[float]]:
    """Score every pair with every metric for which it is large enough.

    Args:
        scorers: Metrics to compute.
        batches: Indices of the pairs [B] and their images, uint8 [B, 2, 3, H, W].
        device: Device that computes the scores.

    Returns:
        The scores of each metric by its result key, in the order of the batches.
    """
    scores: dict[str, list[float]] = {scorer.key: [] for scorer in scorers}
    for _, images in batches:
        a, b = images.to(device).unbind(dim=1)
        for scorer in scorers:
            if min(a.shape[-2:]) >= scorer.smallest_side:
                scores[scorer.key] += scorer.score(a, b).tolist()
    return scores


def short_names(names: Sequence[str], endings: Sequence[str] = (".png", ".npy")) -> list[str]:
    """Return each name without its suffix, or with it if two of the results would be equal.

    The suffix also stays if an output file of the short name would have the name of a folder: a.jpg beside a.png/0.jpg.

    Args:
        names: Different names.
        endings: What follows the result in the names of output files; by default that of `movq reconstruct`.
    """
    short = [str(PurePosixPath(name).with_suffix("")) for name in names]
    parents = {PurePosixPath(folder) for folder in {name.rpartition("/")[0] for name in names}}
    folders = {str(folder) for parent in parents for folder in (parent, *parent.parents)}
    used = {name.removesuffix(ending) for ending in endings for name in folders if name.endswith(ending)}
    short = [name if shortened in used else shortened for name, shortened in zip(names, short, strict=True)]
    while True:  # A complete name can be what is left of another one: a.jpg, a.png and a.jpg.png.
        equal = {name for name, number in Counter(short).items() if number > 1}
        if not equal:
            return short
        short = [name if shortened in equal else shortened for name, shortened in zip(names, short, strict=True)]


def _index_by_name(names: Sequence[str]) -> dict[str, int]:
    return {key: index for index, key in enumerate(short_names(names))}


def _to_unit_range(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Scale both to [0, 1] in float64: SSIM subtracts nearly equal squares, for which float32 is too coarse."""
    if a.shape != b.shape:
        raise ValueError(f"paired images must have one shape, not {list(a.shape)} and {list(b.shape)}")
    scaled = [x.double() / 255 if x.dtype == torch.uint8 else x.double() for x in (a, b)]
    return scaled[0], scaled[1]


def _window_mean(x: Tensor, window: int) -> Tensor:
    # A uniform window is separable: with a side of 11 it takes 22 additions a pixel in place of 121.
    rows = F.avg_pool2d(x, (window, 1), stride=1)
    return F.avg_pool2d(rows, (1, window), stride=1)
