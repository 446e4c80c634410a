"""FID of what is made during training, measured as `movq evaluate` does: by the same features and the same distance."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from movq_cli.console import Console
from movq_cli.evaluation import distributions, extractors, feature_cache
from movq_cli.evaluation.distributions import FeatureStatistics
from movq_cli.evaluation.feature_cache import Extractor
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.ranks import Ranks

_BATCH = 32


class FIDEvaluator:
    """Inception, and what it sees in the real images.

    Args:
        inception: On the device.
        real: Mean [D] and covariance [D, D] of the real images' features.
        device: Where images are looked at.
        ranks: Who shares the work.
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
        """One who has seen a set; every rank must ask for it.

        Args:
            images: The real images, cropped as the model makes them.
            cache: Where their features are kept.
            weights: Folder with Inception's weights; None = torch hub's.
            device: Where.
            ranks: Who shares the work.
            console: For the progress.

        Raises:
            BadRequestError: The weights are missing, or there are too few images.
        """
        distributions.require_images("fid", len(images))
        inception = extractors.load_inception(weights, device)
        with extractors.exact_float32():
            seen = feature_cache.cached_features(
                images, inception, cache, batch_size=_BATCH, device=device, ranks=ranks, console=console
            )
            real = ranks.from_first(lambda: seen.statistics(torch.device("cpu")))
        return cls(inception, real, device, ranks)

    def fid(self, batches: Iterable[Tensor]) -> float:
        """The distance of all ranks' images, the same on each; these are its own, uint8 [B, 3, H, W] on the device."""
        # In float64 on the CPU, so that ranks can add theirs up by sending them to each other.
        mine = FeatureStatistics(self.inception.width)
        with extractors.exact_float32():
            for batch in batches:
                for part in batch.split(_BATCH):
                    mine.update(self.inception(part.contiguous(memory_format=torch.channels_last)))
        together = FeatureStatistics(self.inception.width)
        for part_of_all in self.ranks.all_gather(mine):
            together.merge(part_of_all)
        return distributions.frechet_distance(*self.real, together.mean, together.covariance)
