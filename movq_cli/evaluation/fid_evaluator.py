"""FID during training: the same features and the same distance as in `movq evaluate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from movq_cli.console import Console
from movq_cli.evaluation import distributions, extractors, feature_cache
from movq_cli.evaluation.distributions import FeatureStatistics
from movq_cli.evaluation.feature_cache import Extractor, Features
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.evaluation.metrics import FID
from movq_cli.ranks import Ranks

_BATCH_SIZE = 32
"""Number of images that Inception gets at once."""


def real_features(
    images: ImageSet, cache: Path, weights: Path | None, device: torch.device, ranks: Ranks, console: Console
) -> tuple[Extractor, Features]:
    """Return Inception and the features of real images, which are cached; every rank must call this.

    Args:
        images: Real images.
        cache: Folder of the feature cache.
        weights: Folder that is searched for Inception's weights before torch hub's; None searches torch hub's.
        device: Device that runs Inception.
        ranks: All processes of the run.
        console: Console for progress.

    Raises:
        BadRequestError: The weights are missing.
    """
    inception = extractors.load_inception(weights, device)
    with extractors.exact_float32():
        features = feature_cache.cached_features(
            images, inception, cache, batch_size=_BATCH_SIZE, device=device, ranks=ranks, console=console
        )
    return inception, features


def extract_features(inception: Extractor, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the features [n, D] of images, a few of them at once.

    Args:
        inception: Inception.
        batches: Images, uint8 [B, 3, H, W] on its device.
    """
    for batch in batches:
        for part in batch.split(_BATCH_SIZE):
            yield inception(part.contiguous(memory_format=torch.channels_last))


class FIDEvaluator:
    """Inception and the statistics of the real images: computes the FID of any number of generated images.

    Args:
        inception: Inception, on the device.
        real: Mean [D] and covariance [D, D] of the real images' features.
        device: Device that runs Inception.
        ranks: All processes of the run, which share the work.
    """

    def __init__(self, inception: Extractor, real: tuple[Tensor, Tensor], device: torch.device, ranks: Ranks) -> None:
        self.inception = inception
        self.real = real
        self.device = device
        self.ranks = ranks

    @classmethod
    def of(
        cls, images: ImageSet, cache: Path, weights: Path | None, device: torch.device, ranks: Ranks, console: Console
    ) -> Self:
        """Build an evaluator against a set of real images; every rank must call this.

        Args:
            images: Real images, cropped to the size that the model generates.
            cache: Folder of the feature cache.
            weights: Folder that is searched for Inception's weights before torch hub's; None searches torch hub's.
            device: Device that runs Inception.
            ranks: All processes of the run.
            console: Console for progress.

        Raises:
            BadRequestError: The weights are missing, or there are too few images.
        """
        FID.require_images(len(images))
        inception, features = real_features(images, cache, weights, device, ranks, console)
        with extractors.exact_float32():
            real = ranks.from_first(lambda: features.statistics(torch.device("cpu")))
        return cls(inception, real, device, ranks)

    def fid(self, batches: Iterable[Tensor]) -> float:
        """Return the FID of the images of all ranks; every rank must call this and gets the same value.

        Args:
            batches: This rank's images, uint8 [B, 3, H, W] on the device.
        """
        # Float64 on the CPU: the ranks send each other their statistics, and not every device has float64.
        own = FeatureStatistics(self.inception.width)
        with extractors.exact_float32():
            for features in extract_features(self.inception, batches):
                own.update(features)
        total = FeatureStatistics(self.inception.width)
        for statistics in self.ranks.all_gather(own):
            total.merge(statistics)
        return distributions.frechet_distance(*self.real, total.mean, total.covariance)
