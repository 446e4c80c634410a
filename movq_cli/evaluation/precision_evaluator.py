"""Precision and recall of images as they are sampled: the same values as those of `movq evaluate --prc`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from movq_cli.console import Console
from movq_cli.evaluation import distributions, extractors
from movq_cli.evaluation.feature_cache import Extractor
from movq_cli.evaluation.fid_evaluator import extract_features, real_features
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.evaluation.metrics import NEIGHBOURS, PrecisionRecall
from movq_cli.ranks import SINGLE_PROCESS


class PrecisionEvaluator:
    """Inception and the features of the real images: computes the precision and the recall of generated images.

    Args:
        inception: Inception, on the device.
        real: Features of the real images, float32 [N, D] on the device.
    """

    def __init__(self, inception: Extractor, real: Tensor) -> None:
        self.inception = inception
        self.real = real

    @classmethod
    def of(cls, images: ImageSet, cache: Path, weights: Path | None, device: torch.device, console: Console) -> Self:
        """Build an evaluator against a set of real images.

        Args:
            images: Real images, cropped to the size that the model generates.
            cache: Folder of the feature cache.
            weights: Folder that is searched for Inception's weights before torch hub's; None searches torch hub's.
            device: Device that runs Inception.
            console: Console for progress.

        Raises:
            BadRequestError: The weights are missing, or there are too few images.
        """
        PrecisionRecall.require_images(len(images))
        inception, features = real_features(images, cache, weights, device, SINGLE_PROCESS, console)
        PrecisionRecall.require_images(len(features.indices))  # Corrupt images may have left too few.
        return cls(inception, features.rows.to(device))

    def precision_recall(self, batches: Iterable[Tensor]) -> distributions.PrecisionRecall:
        """Return the precision and the recall of images.

        Args:
            batches: Images, uint8 [B, 3, H, W] on the device.

        Raises:
            BadRequestError: There are too few images.
        """
        with extractors.exact_float32():
            fake = torch.cat(list(extract_features(self.inception, batches)))
            PrecisionRecall.require_images(len(fake))
            return distributions.precision_recall(self.real, fake, k=NEIGHBOURS, references=PrecisionRecall.references)
