"""The inputs of a metric of two sets: the features of one network, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from movq_cli.evaluation.extractors import FeatureExtractor, Inception
from movq_cli.evaluation.feature_cache import Features, Reference
from movq_cli.evaluation.image_sets import ImageSet

_LOGITS_BATCH = 4096


@dataclass(frozen=True)
class SetInputs:
    """The features of both sets by one network.

    Shapes: N real images, M fake images, D features.
    """

    network: FeatureExtractor
    device: torch.device
    fake_images: ImageSet
    fake_features: Features
    real_images: ImageSet | None
    """None where a file of statistics stands in place of the images."""
    real_features: Features | None
    """None where no metric needs them."""
    reference: Reference | None
    """Statistics of the real images from a file."""

    @cached_property
    def real(self) -> Tensor:
        """Features of the real images that could be read, float32 [N, D]."""
        assert self.real_features is not None
        return self.real_features.rows.to(self.device)

    @cached_property
    def fake(self) -> Tensor:
        """Features of the fake images that could be read, float32 [M, D]."""
        return self.fake_features.rows.to(self.device)

    @property
    def real_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the real features; those of a file come before those of the images."""
        if self.reference is not None:
            return self.reference.on(self.device)
        assert self.real_features is not None
        return self.real_features.statistics(self.device)

    @property
    def fake_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the fake features."""
        return self.fake_features.statistics(self.device)

    def fake_logits(self) -> Tensor:
        """Return Inception's class logits of the fake images [M, 1008], on the CPU."""
        assert isinstance(self.network, Inception)
        batches = self.fake_features.rows.split(_LOGITS_BATCH)
        return torch.cat([self.network.logits(rows.to(self.device)).cpu() for rows in batches])
