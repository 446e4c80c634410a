"""The averages of the discriminator's logits over the steps, which LeCam regularization needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from movq_cli.ranks import SINGLE_PROCESS, Ranks

DECAY = 0.99
"""Decay of the averages at each step: that of the authors of LeCam regularization."""


class LogitAverages(nn.Module):
    """Exponential moving averages of the mean logits of images and of reconstructions, without the bias of the start.

    They are equal on all ranks. After n steps, an average is the mean of the n values with weights that fall by DECAY
    from each step to the one before it.

    Args:
        ranks: Processes over whose logits the mean is computed.
    """

    sums: Tensor
    weight: Tensor

    def __init__(self, ranks: Ranks = SINGLE_PROCESS) -> None:
        super().__init__()
        self.ranks = ranks
        self.register_buffer("sums", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(()))

    @property
    def real(self) -> Tensor:
        """Average of the logits of images, scalar float32; minus infinity before the first step: no logit is lower."""
        return torch.where(self.weight > 0, self.sums[0] / self.weight, -torch.inf)

    @property
    def fake(self) -> Tensor:
        """Average of the logits of reconstructions, scalar float32; infinity before the first step."""
        return torch.where(self.weight > 0, self.sums[1] / self.weight, torch.inf)

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor, is_finite: Tensor) -> None:
        """Add the mean logits of a step.

        Args:
            real: Mean logit of this rank's images, scalar.
            fake: Mean logit of this rank's reconstructions, scalar.
            is_finite: Scalar float32; with 0 the averages stay as they are, whatever the logits are.
        """
        means = self.ranks.mean(torch.stack([real, fake]).float())
        is_updated = is_finite.bool()
        self.sums.copy_(torch.where(is_updated, DECAY * self.sums + (1 - DECAY) * means, self.sums))
        self.weight.copy_(torch.where(is_updated, DECAY * self.weight + (1 - DECAY), self.weight))
