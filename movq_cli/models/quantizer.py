"""The interface of a quantizer, and codebook usage; the quantizers are files in `models/quantizers/`.

Shapes: B batch, h w code grid, c chunks, d width of a code (D = c d channels), K codes, N = B h w c vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from movq_cli.errors import BadRequestError


class Quantized(NamedTuple):
    """The output of a quantizer."""

    vectors: Tensor
    """[B, D, h, w] float32: the vectors of the codes. Their gradient reaches the input by the quantizer's estimator."""
    codes: Tensor
    """[B, h, w, c] int64 in [0, K)."""
    losses: Mapping[str, Tensor]
    """Scalar losses by name, empty for a quantizer that needs none; the training settings give each a weight."""


class Quantizer(nn.Module, ABC):
    """The interface between the encoder and the decoder: features to codes, and codes to vectors."""

    def prepare_training(self, gradient: str, entropy_temperature: float | None) -> None:
        """Set how the following forward passes estimate gradients, and whether they give the entropy loss.

        Args:
            gradient: Name of the gradient estimator in `gradients.ESTIMATORS`.
            entropy_temperature: Temperature of the entropy loss; None leaves this loss out.

        Raises:
            BadRequestError: This quantizer has neither, and the arguments are not the defaults of the settings.
        """
        if gradient != "straight-through" or entropy_temperature is not None:
            raise BadRequestError(
                "this quantizer has no distances to codebook entries, which the rotation trick and the entropy loss "
                "need",
                "Set train_vq.quantizer_gradient=straight-through and train_vq.entropy_weight=0, or vq.quantizer=vq.",
            )

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantize features [B, D, h, w] of any float type, in float32 whatever autocast says."""

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """Return the codes [B, h, w, c] int64 of features [B, D, h, w], without the losses."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors [B, D, h, w] float32 of codes [B, h, w, c] int64 in [0, K)."""

    def revive(
        self, unused: Tensor, encoded: Tensor, sample_rows: Callable[[Tensor, int], Tensor]
    ) -> Mapping[str, Tensor]:
        """Move the entries of a codebook that no vector chooses to outputs of the encoder.

        A quantizer without a codebook, which is the default, has nothing to move.

        Args:
            unused: [K] bool, the codes that have not been chosen for a while.
            encoded: [B, D, h, w], features that this rank has quantized.
            sample_rows: Function from this rank's rows [N, d] and a number n to n rows [n, d], drawn at random from
                the rows of all ranks.

        Returns:
            For each parameter that changed, by its name in this module, the rows that did, bool.
        """
        return {}


class CodebookHealth(nn.Module):
    """How much of the codebook a set of images uses, over all chunks together and for each chunk.

    Args:
        chunks: Number of chunks, c.
        codebook_size: Number of codebook entries, K.
    """

    counts: Tensor
    """[c, K] int64: how often each chunk has chosen each entry."""

    def __init__(self, chunks: int, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(chunks, codebook_size, dtype=torch.int64))

    def update(self, codes: Tensor) -> None:
        """Add codes [..., c] to the counts."""
        self.counts += self.count(codes)

    def count(self, codes: Tensor) -> Tensor:
        """Return how often each chunk of codes [..., c] chooses each entry, [c, K] int64."""
        chunks, size = self.counts.shape
        index = (codes + torch.arange(chunks, device=codes.device) * size).flatten()
        # torch.bincount would make the host wait for CUDA.
        return torch.zeros_like(self.counts).view(-1).scatter_add_(0, index, torch.ones_like(index)).view(chunks, size)

    def usage(self) -> tuple[float, list[float]]:
        """Return the share of entries used at least once, in [0, 1]: over all chunks together, and for each chunk."""
        return _usage(self.counts.sum(0)), [_usage(row) for row in self.counts]

    def perplexity(self) -> tuple[float, list[float]]:
        """Return the exponential of the codes' entropy, in [1, K]: over all chunks together, and for each chunk."""
        return _perplexity(self.counts.sum(0)), [_perplexity(row) for row in self.counts]


def _usage(counts: Tensor) -> float:
    return (counts > 0).double().mean().item()


def _perplexity(counts: Tensor) -> float:
    share = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp().item()
