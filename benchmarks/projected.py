"""Run movq with a cheap network in place of Inception: a random projection of the pixels to as many features.

    python -m benchmarks.projected evaluate --fid REAL FAKE ...

The features have the width of Inception's, and the class logits their number. So `evaluate` needs as much memory for
60,000 images as with Inception, but minutes in place of hours. Its metrics mean nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.app import main
from movq_cli.evaluation import extractors
from movq_cli.evaluation.extractors import INCEPTION_WIDTH, Inception
from movq_cli.evaluation.pretrained import find_weights

_SIDE = 8
_CLASSES = 1008


class Projection(nn.Module):
    """A random linear map of the pixels to features, with the classifier of Inception's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(3 * _SIDE**2, INCEPTION_WIDTH)
        self.fc = nn.Linear(INCEPTION_WIDTH, _CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return the features [N, 2048], at least 0, of uint8 images [N, 3, H, W]."""
        pooled = F.adaptive_avg_pool2d(images.float() / 255, _SIDE)
        return (self.features(pooled.flatten(1)).relu(),)


def load_projection(folder: Path | None = None, device: torch.device | str = "cpu") -> Inception:
    """Return the projection as `extractors.load_inception` returns Inception; the file of weights is not read."""
    torch.manual_seed(0)
    return Inception(Projection(), "projection", INCEPTION_WIDTH, find_weights("inception", folder)).to(device)


if __name__ == "__main__":
    extractors.load_inception = load_projection
    main()
