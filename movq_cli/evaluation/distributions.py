"""How near two sets of images are as distributions: FID, KID, Inception Score, precision and recall.

All of them see the images through Inception's features only. Everything is computed in float64, save the
distances behind precision and recall.

Shapes: N samples, D features (2,048 for Inception's pool), C classes.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from movq_cli.errors import BadRequestError

MINIMUM_IMAGES = {"fid": 2, "isc": 1, "kid": 2, "prc": 4, "prc_vgg": 4, "copies": 2}
"""Fewer images a set than this and the figure is not defined (a covariance, a third neighbour)."""

VARIANTS = {
    "fid": "Inception pool features, sample covariance",
    "isc": "Inception logits without bias, mean over 10 shuffled splits",
    "kid": "Inception pool features, cubic kernel, unbiased, mean over 100 subsets of at most 1,000",
    "precision": "Inception pool features, k = 3, at most 10,000 references",
    "recall": "Inception pool features, k = 3, at most 10,000 references",
    "precision_vgg": "VGG-16 fc2 features, k = 3, all images",
    "recall_vgg": "VGG-16 fc2 features, k = 3, all images",
    "copies": "share of fakes nearer to a real image than that is to any other, Inception pool features",
}
"""What each figure is, for reports: the defaults below."""

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
PRECISION_RECALL_REFERENCES = 10_000
SEED = 2020
"""torch-fidelity's: the same features give the same subsets and so the same figures."""

_ROWS_AT_ONCE = 1024  # rows of a distance matrix held at a time: 0.25 GB against 60,000 columns


class MeanAndSpread(NamedTuple):
    """A figure that is a mean over subsets or splits, and its standard deviation over them."""

    mean: float
    std: float


class Copies(NamedTuple):
    """How near each fake is to the real images."""

    share: float  # in [0, 1], of fakes nearer to their nearest real image than that is to any other real one
    nearest: Tensor  # [M] int64, each fake's nearest real image
    distance: Tensor  # [M] float32, to it


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of the fakes that look real, and of the reals that the fakes reach."""

    precision: float
    recall: float


def require_images(metric: str, count: int) -> None:
    """Refuse a set that is too small for a figure to be defined.

    Args:
        metric: A key of `MINIMUM_IMAGES`.
        count: The images of the smaller set.

    Raises:
        BadRequestError: Too few images.
    """
    if count < MINIMUM_IMAGES[metric]:
        raise BadRequestError(f"{metric} needs at least {MINIMUM_IMAGES[metric]} images in each set, not {count}")


class FeatureStatistics:
    """Mean and covariance of a stream of features, in float64 and without keeping the features.

    Batches are merged by their exact counts, means and scatter matrices (Chan, Golub and LeVeque 1983), so
    neither their sizes nor their order matter beyond rounding.

    Args:
        width: Features a sample, D.
        device: Where the D x D matrix lives.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add a batch of features [N, D], of any float type and on any device."""
        features = features.to(self.mean)
        mean = features.mean(dim=0)
        centred = features - mean
        self._merge(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add what another instance has seen: of another process, say."""
        self._merge(other.count, other.mean.to(self.mean), other._scatter.to(self.mean))

    @property
    def covariance(self) -> Tensor:
        """The sample covariance [D, D], divided by N - 1 as in `numpy.cov`.

        Raises:
            BadRequestError: Fewer than two samples.
        """
        require_images("fid", self.count)
        return self._scatter / (self.count - 1)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if total == 0:
            return
        step = mean - self.mean
        self._scatter.add_(scatter).addr_(step, step, alpha=self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared Fréchet distance between two Gaussians: FID (Heusel et al. 2017, equation 6).

    The trace of (sigma1 sigma2)^(1/2) is that of the symmetric (s sigma2 s)^(1/2) with s = sigma1^(1/2): two
    symmetric eigendecompositions, which are exact for singular covariances too and seven times faster than
    `scipy.linalg.sqrtm` at D = 2,048.

    Args:
        mu1: Mean [D] of one set.
        sigma1: Covariance [D, D].
        mu2: Mean [D] of the other set, on the same device.
        sigma2: Covariance [D, D].

    Returns:
        The distance, at least 0.
    """
    mu1, sigma1, mu2, sigma2 = (x.double() for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ sigma2 @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    # Rounding takes equal sets a little below zero, where no distance can be.
    return max(float(distance), 0.0)


def kernel_distance(
    real: Tensor,
    fake: Tensor,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = SEED,
) -> MeanAndSpread:
    """Kernel distance, KID (Binkowski et al. 2018): unbiased MMD^2 with the kernel (x.y / D + 1)^3.

    Subsets are drawn as torch-fidelity draws them (fake first, without replacement), so the same features
    give its figures to within its float32 rounding.

    Args:
        real: Features [N, D].
        fake: Features [M, D].
        subsets: How many pairs of subsets are averaged.
        subset_size: Samples a subset; no more than the smaller set has.
        seed: Of the draws.

    Returns:
        Mean and standard deviation over subsets. The mean may be a little below 0: the estimate is unbiased.

    Raises:
        BadRequestError: Fewer than two samples.
    """
    size = min(subset_size, len(real), len(fake))
    require_images("kid", size)
    draws = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = fake[torch.from_numpy(draws.choice(len(fake), size, replace=False)).to(fake.device)]
        y = real[torch.from_numpy(draws.choice(len(real), size, replace=False)).to(real.device)]
        distances.append(_unbiased_mmd(x.double(), y.double()))
    return MeanAndSpread(float(np.mean(distances)), float(np.std(distances)))


def inception_score(logits: Tensor, splits: int = 10, seed: int = SEED) -> MeanAndSpread:
    """Inception Score (Salimans et al. 2016): exp of the mean KL from each image's classes to the split's.

    As torch-fidelity computes it: Inception's 1,008 logits without their bias, shuffled by a seeded
    permutation (a set sorted by class would otherwise have few classes in each split), then cut.

    Args:
        logits: Class logits of the fakes [N, C].
        splits: Parts whose scores are averaged; no more than there are images.
        seed: Of the permutation.

    Returns:
        Mean and standard deviation over the splits; each at least 1 and at most C.

    Raises:
        BadRequestError: No image.
    """
    require_images("isc", len(logits))
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits))).to(logits.device)
    scores = []
    # Not tensor_split: it puts the longer parts first, torch-fidelity spreads them.
    parts = min(splits, len(logits))
    bounds = [i * len(logits) // parts for i in range(parts + 1)]
    for start, stop in pairwise(bounds):
        log_p = logits[order[start:stop]].double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp()))
    return MeanAndSpread(float(np.mean(scores)), float(np.std(scores)))


def precision_recall(
    real: Tensor,
    fake: Tensor,
    k: int = 3,
    references: int | None = PRECISION_RECALL_REFERENCES,
    seed: int = SEED,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equation 1).

    The defaults are the guided-diffusion evaluator's convention (Dhariwal and Nichol 2021): Inception's pool
    features, k = 3, up to 10,000 references against every sample. VGG features, StyleGAN's convention, give
    other figures. Distances are taken a thousand rows at a time: 60,000 by 60,000 would be 14 GB a matrix.

    Args:
        real: Features [N, D].
        fake: Features [M, D], on the same device.
        k: The neighbour whose distance is a sample's radius, the sample itself not counted.
        references: Real samples used, drawn without replacement; None = all.
        seed: Of that draw.

    Raises:
        BadRequestError: A set has no k-th neighbour.
    """
    if min(len(real), len(fake)) <= k:
        raise BadRequestError(f"precision and recall need more than {k} images in each set")
    if references is not None and len(real) > references:
        chosen = np.random.RandomState(seed).choice(len(real), references, replace=False)
        real = real[torch.from_numpy(np.sort(chosen)).to(real.device)]
    # Distances do not see a common shift; without it, |x|^2 - 2 x.y + |y|^2 cancels fewer digits.
    centre = real.mean(dim=0)
    real, fake = real - centre, fake - centre
    return PrecisionRecall(_share_within(fake, real, k), _share_within(real, fake, k))


def copies(real: Tensor, fake: Tensor) -> Copies:
    """Fakes that may be copies: the complement of authenticity (Alaa et al. 2022, section 3.3).

    Where the generator is as good as a fresh draw from the real distribution, about half of its images count as nearer;
    one that repeats its training images has nearly all.

    Args:
        real: Features [N, D] of the images that were trained on.
        fake: Features [M, D], on the same device.

    Raises:
        BadRequestError: Fewer than two real images.
    """
    require_images("copies", len(real))
    centre = real.mean(dim=0)
    real, fake = real - centre, fake - centre
    found = [_squared_distances(rows, real).min(dim=1) for rows in torch.split(fake, _ROWS_AT_ONCE)]
    distance, nearest = torch.cat([tile.values for tile in found]), torch.cat([tile.indices for tile in found])
    chosen, which = nearest.unique(return_inverse=True)
    neighbour = torch.cat([_kth_distance(rows, real, 1) for rows in torch.split(real[chosen], _ROWS_AT_ONCE)])
    share = (distance < neighbour[which]).double().mean().item()
    return Copies(share, nearest, distance.sqrt())


def _unbiased_mmd(x: Tensor, y: Tensor) -> float:
    """MMD^2 without the diagonals (Gretton et al. 2012, equation 3); x, y: [M, D] float64."""
    size = len(x)
    within = 0.0
    for features in (x, y):
        kernel = _cubic_kernel(features, features)
        within += float(kernel.sum() - kernel.trace()) / (size * (size - 1))
    return within - 2 * float(_cubic_kernel(x, y).mean())


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _share_within(points: Tensor, manifold: Tensor, k: int) -> float:
    """The share of points that lie in the k-neighbour ball of at least one sample of the manifold."""
    radii = torch.cat([_kth_distance(rows, manifold, k) for rows in torch.split(manifold, _ROWS_AT_ONCE)])
    inside = [(_squared_distances(rows, manifold) <= radii).any(dim=1) for rows in torch.split(points, _ROWS_AT_ONCE)]
    return float(torch.cat(inside).double().mean())


def _kth_distance(rows: Tensor, manifold: Tensor, k: int) -> Tensor:
    """Squared distance of rows of the manifold to their k-th neighbour in it."""
    # A sample is its own nearest neighbour, hence k + 1.
    return _squared_distances(rows, manifold).topk(k + 1, dim=1, largest=False).values[:, k]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    # vector_norm makes no copy of 60,000 x 2,048 squares.
    norms_a, norms_b = (torch.linalg.vector_norm(x, dim=1).square() for x in (a, b))
    return torch.addmm(norms_a[:, None] + norms_b, a, b.T, alpha=-2).clamp_(min=0)
