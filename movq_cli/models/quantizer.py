"""The multichannel vector quantizer with one shared codebook (section 3.1), and its health.

Shapes: B batch, h w code grid, c chunks, d width of a code (D = c d channels), K codes, N = B h w c vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DISTANCES = 2**24
"""Numbers that are held at once: 64 MiB, however many vectors and entries there are."""


class Quantized(NamedTuple):
    """What quantization gives."""

    vectors: Tensor
    """[B, D, h, w] float32: the codes' vectors, with the gradient passed straight through to the input."""
    codes: Tensor
    """[B, h, w, c] int64 in [0, K)."""
    codebook_loss: Tensor
    """Scalar, second term of equation 3: moves the codebook towards the encoder's output."""
    commitment_loss: Tensor
    """Scalar, third term of equation 3 without its beta: moves the encoder's output towards the codebook."""


class VectorQuantizer(nn.Module):
    """Cut the channels into c chunks and replace each by its nearest codebook entry (equation 2).

    All chunks share the one codebook, so that K vectors of width d express K^c different features.

    Args:
        codebook_size: K.
        code_dim: d.
    """

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize [B, D, h, w] of any float type; the arithmetic is float32 whatever autocast says."""
        with torch.autocast(z.device.type, enabled=False):
            split = self._split(z.float())
            rows = split.contiguous()  # of one layout with the vectors, or the losses' loops are slow on the CPU
            codes = self._nearest(rows)
            vectors = self.embedding(codes)
            codebook_loss = F.mse_loss(vectors, rows.detach())
            commitment_loss = F.mse_loss(rows, vectors.detach())
            straight_through = split + (vectors - split).detach()
        return Quantized(self._join(straight_through), codes, codebook_loss, commitment_loss)

    def encode(self, z: Tensor) -> Tensor:
        """The codes [B, h, w, c] of [B, D, h, w], without the losses."""
        with torch.autocast(z.device.type, enabled=False):
            return self._nearest(self._split(z.float()))

    def decode(self, codes: Tensor) -> Tensor:
        """The vectors [B, D, h, w] of codes [B, h, w, c] in [0, K)."""
        # Looked up, the vectors lie channels last, in which the CPU's GroupNorm is slower and loses digits; on CUDA the
        # convolutions' weights decide.
        return self._join(self.embedding(codes)).contiguous()

    @torch.no_grad()
    def revive(self, dead: Tensor, replacements: Tensor) -> None:
        """Move entries that no vector chooses to where vectors are.

        Args:
            dead: [K, 1] bool, the entries to move.
            replacements: [K, d], where each would go.
        """
        entries = self.embedding.weight
        entries.copy_(torch.where(dead, replacements, entries))

    def vectors(self, z: Tensor) -> Tensor:
        """The vectors [N, d] float32 that [B, D, h, w] is cut into, image by image."""
        return self._split(z.float()).reshape(-1, self.embedding.embedding_dim)

    def _split(self, z: Tensor) -> Tensor:
        """[B, D, h, w] to [B, h, w, c, d]."""
        return z.permute(0, 2, 3, 1).unflatten(-1, (-1, self.embedding.embedding_dim))

    def _join(self, split: Tensor) -> Tensor:
        """[B, h, w, c, d] to [B, D, h, w]."""
        return split.flatten(-2).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _nearest(self, split: Tensor) -> Tensor:
        """Codes [B, h, w, c] of the nearest entries.

        |z|^2 is the same for every entry and is left out: beside it the distances between entries drown in rounding.
        """
        entries = self.embedding.weight
        squares = entries.square().sum(1)
        blocks = split.reshape(-1, entries.shape[1]).split(max(1, _DISTANCES // len(entries)))
        codes = [torch.addmm(squares, block, entries.t(), alpha=-2).argmin(1) for block in blocks]
        return torch.cat(codes).view(split.shape[:-1])


class CodebookHealth(nn.Module):
    """How much of the codebook a whole set of images uses, overall and for each chunk.

    Args:
        chunks: c.
        codebook_size: K.
    """

    counts: Tensor

    def __init__(self, chunks: int, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(chunks, codebook_size, dtype=torch.int64))

    def update(self, codes: Tensor) -> None:
        """Count codes [..., c]."""
        self.counts += self.count(codes)

    def count(self, codes: Tensor) -> Tensor:
        """How often each chunk of codes [..., c] chooses each entry, [c, K] int64."""
        chunks, size = self.counts.shape
        place = (codes + torch.arange(chunks, device=codes.device) * size).flatten()
        # Not bincount, for which the host waits on CUDA.
        return torch.zeros_like(self.counts).view(-1).scatter_add_(0, place, torch.ones_like(place)).view(chunks, size)

    def usage(self) -> tuple[float, list[float]]:
        """Share of the entries seen at least once, in [0, 1]: over all chunks together, and for each."""
        return _usage(self.counts.sum(0)), [_usage(row) for row in self.counts]

    def perplexity(self) -> tuple[float, list[float]]:
        """Exponential of the codes' entropy, in [1, K]: over all chunks together, and for each."""
        return _perplexity(self.counts.sum(0)), [_perplexity(row) for row in self.counts]


def _usage(counts: Tensor) -> float:
    return (counts > 0).double().mean().item()


def _perplexity(counts: Tensor) -> float:
    share = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp().item()
