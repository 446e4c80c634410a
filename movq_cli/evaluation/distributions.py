"""Metrics of two sets of images as distributions: FID, KID, Inception Score, precision and recall, and copies.

All are computed from features of a pretrained network, which `extractors` provides. Statistics, distances between
Gaussians, kernels and scores are computed in float64. The distances between single images, which precision, recall
and the search for copies use, have the type of the features (float32).

Shapes: N real images, M fake images, D features (2,048 for Inception's pool layer, 4,096 for VGG-16), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from movq_cli.errors import BadRequestError

SEED = 2020
"""Seed of all subsets, as in torch-fidelity: the same features give the same subsets and the same values."""

_TILE = 4096  # rows and columns of a distance matrix in memory at a time: 67 MB


class MeanAndSpread(NamedTuple):
    """Mean and standard deviation of a metric over subsets or splits."""

    mean: float
    std: float


class NearestImages(NamedTuple):
    """The nearest real image of each fake one."""

    share: float  # share in [0, 1] of fakes that are nearer to a real image than that is to any other real one
    nearest: Tensor  # [M] int64, index of the nearest real image
    distance: Tensor  # [M] float32, Euclidean distance to it


class PrecisionRecall(NamedTuple):
    """Precision, the share of fakes that look real, and recall, the share of reals that the fakes cover; in [0, 1]."""

    precision: float
    recall: float


class FeatureStatistics:
    """Mean and covariance of a stream of features, in float64, without storing the features.

    Batches are merged by their exact sizes, means and scatter matrices (Chan, Golub and LeVeque 1983), so neither the
    sizes of the batches nor their order matter beyond rounding.

    Args:
        width: Number of features D.
        device: Device that holds the D x D matrix.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add a batch.

        Args:
            features: Features [N, D], of any float type and on any device.
        """
        features = features.to(self.mean)
        mean = features.mean(dim=0)
        centred = features - mean
        self._merge(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the statistics of other features, of another process for example."""
        self._merge(other.count, other.mean.to(self.mean), other._scatter.to(self.mean))

    @property
    def covariance(self) -> Tensor:
        """The sample covariance [D, D], divided by N - 1 as in `numpy.cov`.

        Raises:
            BadRequestError: There are fewer than two samples.
        """
        if self.count < 2:
            raise BadRequestError(f"a covariance needs at least 2 images, not {self.count}")
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
    """Return the squared Fréchet distance between two Gaussians: FID (Heusel et al. 2017, equation 6).

    The trace of (sigma1 sigma2)^(1/2) equals that of the symmetric matrix (s sigma2 s)^(1/2) with s = sigma1^(1/2). So
    two symmetric eigendecompositions suffice. They are exact for singular covariances too, and seven times faster
    than `scipy.linalg.sqrtm` at D = 2,048.

    Args:
        mu1: Mean [D] of one set.
        sigma1: Covariance [D, D] of that set.
        mu2: Mean [D] of the other set, on the same device.
        sigma2: Covariance [D, D] of the other set.

    Returns:
        The distance, at least 0.
    """
    mu1, sigma1, mu2, sigma2 = (x.double() for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ sigma2 @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    # Rounding can put the distance of equal sets slightly below zero.
    return max(float(distance), 0.0)


def kernel_distance(real: Tensor, fake: Tensor, *, subsets: int, subset_size: int, seed: int = SEED) -> MeanAndSpread:
    """Return KID (Binkowski et al. 2018), the unbiased squared MMD with the kernel (x.y / D + 1)^3.

    Subsets are drawn as in torch-fidelity (the fake one first, without replacement), so the same features give its
    values to within its float32 rounding.

    Args:
        real: Features [N, D].
        fake: Features [M, D].
        subsets: Number of pairs of subsets over which the distance is averaged.
        subset_size: Number of samples in a subset; at most the size of the smaller set is used.
        seed: Seed of the subsets.

    Returns:
        Mean and standard deviation over the subsets. The estimate is unbiased, so the mean may be slightly below 0.

    Raises:
        ValueError: There are fewer than two samples.
    """
    size = min(subset_size, len(real), len(fake))
    if size < 2:
        raise ValueError(f"the kernel distance needs at least 2 samples, not {size}")
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = fake[torch.from_numpy(random.choice(len(fake), size, replace=False)).to(fake.device)]
        y = real[torch.from_numpy(random.choice(len(real), size, replace=False)).to(real.device)]
        distances.append(_unbiased_mmd(x.double(), y.double()))
    return MeanAndSpread(float(np.mean(distances)), float(np.std(distances)))


def inception_score(logits: Tensor, *, splits: int, seed: int = SEED) -> MeanAndSpread:
    """Return the Inception Score (Salimans et al. 2016): exp of the mean KL from each image's classes to the split's.

    It is computed as in torch-fidelity: Inception's 1,008 logits without their bias are shuffled by a seeded
    permutation and then split. Without shuffling, each split of a set that is sorted by class would have few classes.

    Args:
        logits: Class logits of the fake images [M, C].
        splits: Number of splits whose scores are averaged; at most the number of images is used.
        seed: Seed of the permutation.

    Returns:
        Mean and standard deviation over the splits; the score of a split is at least 1 and at most C.

    Raises:
        ValueError: There is no image.
    """
    if len(logits) == 0:
        raise ValueError("the Inception Score needs at least 1 image, not 0")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits))).to(logits.device)
    # Not tensor_split: it makes the first splits longer, where torch-fidelity spaces the longer ones evenly.
    parts = min(splits, len(logits))
    bounds = [i * len(logits) // parts for i in range(parts + 1)]
    return _score_of_splits([logits[order[start:stop]] for start, stop in pairwise(bounds)])


def ordered_inception_score(logits: Tensor, *, split_size: int) -> MeanAndSpread:
    """Return the Inception Score as guided-diffusion's evaluator computes it: over consecutive images, not shuffled.

    Args:
        logits: Class logits of the fake images [M, C], in the order of the images.
        split_size: Number of images in a split; the last split has the rest.

    Returns:
        Mean and standard deviation over the splits; the score of a split is at least 1 and at most C.

    Raises:
        ValueError: There is no image.
    """
    if len(logits) == 0:
        raise ValueError("the Inception Score needs at least 1 image, not 0")
    return _score_of_splits(logits.split(split_size))


def _score_of_splits(splits: Sequence[Tensor]) -> MeanAndSpread:
    """Return the mean and the standard deviation of the Inception Scores of splits, logits [M, C] each."""
    scores = []
    for logits in splits:
        log_p = logits.double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp()))
    return MeanAndSpread(float(np.mean(scores)), float(np.std(scores)))


def precision_recall(
    real: Tensor, fake: Tensor, *, k: int, references: int | None = None, seed: int = SEED
) -> PrecisionRecall:
    """Return improved precision and recall (Kynkäänniemi et al. 2019, equation 1).

    guided-diffusion's evaluator (Dhariwal and Nichol 2021) uses Inception's pool features, k = 3, and at most 10,000
    real images against every fake one. StyleGAN's convention, VGG-16 features, gives other values. The distances are
    computed in square tiles, since a complete matrix of 60,000 by 60,000 would take 14 GB.

    Args:
        real: Features [N, D].
        fake: Features [M, D], on the same device.
        k: Number of the neighbour whose distance is the radius of a sample's ball; the sample itself does not count.
        references: Number of real samples that are used at most, drawn without replacement; None uses all.
        seed: Seed of that draw.

    Raises:
        ValueError: A set has no k-th neighbour.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} images in each set")
    if references is not None and len(real) > references:
        chosen = np.random.RandomState(seed).choice(len(real), references, replace=False)
        real = real[torch.from_numpy(np.sort(chosen)).to(real.device)]
    centre = real.mean(dim=0)
    return PrecisionRecall(_share_within(fake, real, k, centre), _share_within(real, fake, k, centre))


def find_copies(real: Tensor, fake: Tensor) -> NearestImages:
    """Find fakes that may be copies: their share is the complement of authenticity (Alaa et al. 2022, section 3.3).

    If the generator is as good as a fresh draw from the real distribution, about half of its images count as copies.
    If it repeats its training images, nearly all do.

    Args:
        real: Features [N, D] of the training images.
        fake: Features [M, D], on the same device.

    Raises:
        ValueError: There are fewer than two real images.
    """
    if len(real) < 2:
        raise ValueError(f"the search for copies needs at least 2 real images, not {len(real)}")
    centre = real.mean(dim=0)
    distance = torch.full((len(fake),), math.inf, device=fake.device)
    nearest = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    for rows, columns, distances in _distance_tiles(fake, real, centre):
        found = distances.min(dim=1)
        is_nearer = found.values < distance[rows]
        distance[rows] = torch.where(is_nearer, found.values, distance[rows])
        nearest[rows] = torch.where(is_nearer, found.indices + columns.start, nearest[rows])
    chosen, row_of_fake = nearest.unique(return_inverse=True)
    neighbour = _kth_distances(real, 1, centre, chosen)
    share = (distance < neighbour[row_of_fake]).double().mean().item()
    return NearestImages(share, nearest, distance.sqrt())


def _unbiased_mmd(x: Tensor, y: Tensor) -> float:
    """Return the squared MMD without the diagonals (Gretton et al. 2012, equation 3) of two float64 [n, D] tensors."""
    size = len(x)
    within = 0.0
    for features in (x, y):
        kernel = _cubic_kernel(features, features)
        within += float(kernel.sum() - kernel.trace()) / (size * (size - 1))
    return within - 2 * float(_cubic_kernel(x, y).mean())


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _share_within(points: Tensor, manifold: Tensor, k: int, centre: Tensor) -> float:
    """Return the share of points that lie in the k-neighbour ball of at least one sample of the manifold."""
    radii = _kth_distances(manifold, k, centre)
    is_inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for rows, columns, distances in _distance_tiles(points, manifold, centre):
        is_inside[rows] |= (distances <= radii[columns]).any(dim=1)
    return float(is_inside.double().mean())


def _kth_distances(manifold: Tensor, k: int, centre: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Return the squared distance of samples of a manifold to their k-th neighbour in it.

    Args:
        manifold: Features [N, D].
        k: Number of the neighbour.
        centre: Point [D] near the features, as for `_distance_tiles`.
        chosen: Indices [n] of these samples; None stands for all of them.
    """
    count = len(manifold) if chosen is None else len(chosen)
    # Each sample is its own nearest neighbour, hence k + 1.
    smallest = torch.full((count, k + 1), math.inf, device=manifold.device)
    for rows, _, distances in _distance_tiles(manifold, manifold, centre, chosen):
        found = distances.topk(min(k + 1, distances.shape[1]), dim=1, largest=False).values
        smallest[rows] = torch.cat([smallest[rows], found], dim=1).topk(k + 1, dim=1, largest=False).values
    return smallest[:, k]


def _distance_tiles(
    a: Tensor, b: Tensor, centre: Tensor, chosen: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the squared Euclidean distances between two sets of features in tiles, so that the memory is constant.

    Args:
        a: Features [N, D].
        b: Features [M, D], on the same device.
        centre: Point [D] near the features, which is subtracted from them: distances do not change, and without it
            |x|^2 - 2 x.y + |y|^2 loses more digits to cancellation.
        chosen: Indices [N] of the rows of `a` that are used; None uses all.

    Yields:
        The rows and the columns of a tile, and its distances, at least 0.
    """
    for first in range(0, len(a) if chosen is None else len(chosen), _TILE):
        rows = slice(first, first + _TILE)
        x = (a[rows] if chosen is None else a[chosen[rows]]) - centre
        norms = torch.linalg.vector_norm(x, dim=1).square()
        for start in range(0, len(b), _TILE):
            columns = slice(start, start + _TILE)
            y = b[columns] - centre
            distances = norms[:, None] + torch.linalg.vector_norm(y, dim=1).square()
            yield rows, columns, distances.addmm_(x, y.T, alpha=-2).clamp_(min=0)
