"""MoVQ's multichannel vector quantizer (section 3.1), which is VQGAN's with one chunk.

Shapes: B batch, h w code grid, c chunks, d width of a code (D = c d channels), K codes, N = B h w c vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.models.gradients import ESTIMATORS, entropy_loss
from movq_cli.models.quantizer import Quantized, Quantizer
from movq_cli.settings import TokenizerSettings

NAME = "vq"

_MAX_DISTANCES = 2**24
"""Largest number of distances in memory at one time: 64 MiB, for any number of vectors and codebook entries."""


class VectorQuantizer(Quantizer):
    """Cut the channels into c chunks and replace each chunk by its nearest codebook entry (equation 2).

    All chunks share one codebook, so that K vectors of width d express K^c different features. The losses are the
    second term of equation 3 ("codebook", which moves the codebook towards the encoder's output) and its third term
    without the factor beta ("commitment", which moves the encoder's output towards the codebook).

    Args:
        codebook_size: Number of codebook entries, K.
        code_dim: Width of an entry, d.
        normalize: Whether chunks and entries are scaled to unit length before they are compared, and the vectors are
            those of unit length (Yu et al. 2022). The entries are stored as they are trained, of any length.
    """

    def __init__(self, codebook_size: int, code_dim: int, *, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.embedding = nn.Embedding(codebook_size, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.prepare_training("straight-through", None)

    def prepare_training(self, gradient: str, entropy_temperature: float | None) -> None:
        """Set the gradient estimator and the entropy loss; see Quantizer.prepare_training."""
        self.pass_gradient = ESTIMATORS[gradient]
        self.entropy_temperature = entropy_temperature

    def forward(self, z: Tensor) -> Quantized:
        """Quantize features [B, D, h, w]; see Quantizer.forward."""
        with torch.autocast(z.device.type, enabled=False):
            split = self._split(z.float())
            rows = split.contiguous()  # The layout of the vectors; with another one the losses are slow on the CPU.
            entries = self._entries()
            codes = self._nearest(rows, entries)
            vectors = F.embedding(codes, entries)
            losses = {
                "codebook": F.mse_loss(vectors, rows.detach()),
                "commitment": F.mse_loss(rows, vectors.detach()),
            }
            if self.entropy_temperature is not None:
                losses["entropy"] = entropy_loss(rows, entries, self.entropy_temperature)
            passed = self.pass_gradient(split, vectors)
        return Quantized(self._join(passed), codes, losses)

    def encode(self, z: Tensor) -> Tensor:
        """Return the codes [B, h, w, c] of features [B, D, h, w]."""
        with torch.autocast(z.device.type, enabled=False):
            return self._nearest(self._split(z.float()), self._entries())

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors [B, D, h, w] of codes [B, h, w, c] in [0, K)."""
        # The lookup gives the channels-last layout, in which the CPU's GroupNorm is slower and less exact. On CUDA the
        # layout of the convolutions' weights decides.
        return self._join(F.embedding(codes, self._entries())).contiguous()

    @torch.no_grad()
    def revive(
        self, unused: Tensor, encoded: Tensor, sample_rows: Callable[[Tensor, int], Tensor]
    ) -> Mapping[str, Tensor]:
        """Replace each unused entry by a random vector of the batch; see Quantizer.revive."""
        entries = self.embedding.weight
        vectors = self._split(encoded.float()).reshape(-1, entries.shape[1])
        # A replacement for every entry, used or not: the host need not wait for the number of unused ones.
        replacements = sample_rows(vectors, len(entries))
        entries.copy_(torch.where(unused[:, None], replacements, entries))
        return {"embedding.weight": unused}

    def _entries(self) -> Tensor:
        """Return the codebook [K, d] with which vectors are compared and decoded."""
        entries = self._codebook()
        return F.normalize(entries, dim=-1) if self.normalize else entries

    def _codebook(self) -> Tensor:
        """Return the codebook [K, d] before it is scaled to unit length, if it is."""
        return self.embedding.weight

    def _split(self, z: Tensor) -> Tensor:
        """Reshape [B, D, h, w] to the chunks [B, h, w, c, d] that are compared with the entries."""
        split = z.permute(0, 2, 3, 1).unflatten(-1, (-1, self.embedding.embedding_dim))
        return F.normalize(split, dim=-1) if self.normalize else split

    def _join(self, split: Tensor) -> Tensor:
        """Reshape [B, h, w, c, d] to [B, D, h, w]."""
        return split.flatten(-2).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _nearest(self, split: Tensor, entries: Tensor) -> Tensor:
        """Return the indices [B, h, w, c] of the entries [K, d] that are nearest to the chunks [B, h, w, c, d].

        The term |z|^2 of the distance is left out: it is the same for every entry, and where it is large, rounding
        would hide the differences between the entries.
        """
        squares = entries.square().sum(1)
        rows = split.reshape(-1, entries.shape[1])
        # The graph of an exported model must not depend on the number of images.
        is_one = torch.compiler.is_exporting()
        blocks = [rows] if is_one else rows.split(max(1, _MAX_DISTANCES // len(entries)))
        codes = [torch.addmm(squares, block, entries.t(), alpha=-2).argmin(1) for block in blocks]
        return torch.cat(codes).view(split.shape[:-1])


def build(settings: TokenizerSettings) -> Quantizer:
    """Return an untrained quantizer."""
    return VectorQuantizer(settings.codebook_size, settings.code_dim, normalize=settings.normalize_codes)
