"""The quantizers of the tokenizer, among them MoVQ's multichannel vector quantizer (section 3.1), and codebook usage.

Shapes: B batch, h w code grid, c chunks, d width of a code (D = c d channels), K codes, N = B h w c vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.errors import BadRequestError
from movq_cli.settings import TokenizerSettings

_MAX_DISTANCES = 2**24
"""Largest number of distances in memory at one time: 64 MiB, for any number of vectors and codebook entries."""


class Quantized(NamedTuple):
    """The output of a quantizer."""

    vectors: Tensor
    """[B, D, h, w] float32: the vectors of the codes; their gradient passes straight through to the input."""
    codes: Tensor
    """[B, h, w, c] int64 in [0, K)."""
    losses: Mapping[str, Tensor]
    """Scalar losses by name, empty for a quantizer that needs none; the training settings give each a weight."""


class Quantizer(nn.Module, ABC):
    """The interface between the encoder and the decoder: features to codes, and codes to vectors."""

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

    def forward(self, z: Tensor) -> Quantized:
        """Quantize features [B, D, h, w]; see Quantizer.forward."""
        with torch.autocast(z.device.type, enabled=False):
            split = self._split(z.float())
            rows = split.contiguous()  # The layout of the vectors; with another one the losses are slow on the CPU.
            codes = self._nearest(rows)
            vectors = F.embedding(codes, self._entries())
            losses = {
                "codebook": F.mse_loss(vectors, rows.detach()),
                "commitment": F.mse_loss(rows, vectors.detach()),
            }
            straight_through = split + (vectors - split).detach()
        return Quantized(self._join(straight_through), codes, losses)

    def encode(self, z: Tensor) -> Tensor:
        """Return the codes [B, h, w, c] of features [B, D, h, w]."""
        with torch.autocast(z.device.type, enabled=False):
            return self._nearest(self._split(z.float()))

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
        entries = self.embedding.weight
        return F.normalize(entries, dim=-1) if self.normalize else entries

    def _split(self, z: Tensor) -> Tensor:
        """Reshape [B, D, h, w] to the chunks [B, h, w, c, d] that are compared with the entries."""
        split = z.permute(0, 2, 3, 1).unflatten(-1, (-1, self.embedding.embedding_dim))
        return F.normalize(split, dim=-1) if self.normalize else split

    def _join(self, split: Tensor) -> Tensor:
        """Reshape [B, h, w, c, d] to [B, D, h, w]."""
        return split.flatten(-2).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _nearest(self, split: Tensor) -> Tensor:
        """Return the indices [B, h, w, c] of the nearest entries.

        The term |z|^2 of the distance is left out: it is the same for every entry, and where it is large, rounding
        would hide the differences between the entries.
        """
        entries = self._entries()
        squares = entries.square().sum(1)
        rows = split.reshape(-1, entries.shape[1])
        # The graph of an exported model must not depend on the number of images.
        is_one = torch.compiler.is_exporting()
        blocks = [rows] if is_one else rows.split(max(1, _MAX_DISTANCES // len(entries)))
        codes = [torch.addmm(squares, block, entries.t(), alpha=-2).argmin(1) for block in blocks]
        return torch.cat(codes).view(split.shape[:-1])


class LogitQuantizer(Quantizer):
    """Choose the entry with the largest logit, as VQGAN's GumbelVQ does after training (Jang et al. 2017).

    The logits are a learned 1x1 convolution of the features. Gradients pass straight through the choice, as if the
    vector were the mean of all entries with the weights of the softmax; noise and a temperature are not used.

    Args:
        codebook_size: Number of codebook entries, K.
        code_dim: Width of an entry and number of channels of the features, D.
    """

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(code_dim, codebook_size, 1)
        self.embed = nn.Embedding(codebook_size, code_dim)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize features [B, D, h, w]; see Quantizer.forward. There are no losses."""
        with torch.autocast(z.device.type, enabled=False):
            logits = self.proj(z.float()).permute(0, 2, 3, 1)
            codes = logits.argmax(-1, keepdim=True)
            soft = logits.softmax(-1) @ self.embed.weight.detach()
            vectors = self.embed(codes.squeeze(-1)) + (soft - soft.detach())
        return Quantized(vectors.permute(0, 3, 1, 2), codes, {})

    def encode(self, z: Tensor) -> Tensor:
        """Return the codes [B, h, w, 1] of features [B, D, h, w]."""
        with torch.autocast(z.device.type, enabled=False):
            return self.proj(z.float()).argmax(1).unsqueeze(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors [B, D, h, w] of codes [B, h, w, 1] in [0, K)."""
        return self.embed(codes.squeeze(-1)).permute(0, 3, 1, 2).contiguous()


def _vector_quantizer(settings: TokenizerSettings) -> Quantizer:
    return VectorQuantizer(settings.codebook_size, settings.code_dim, normalize=settings.normalize_codes)


def _logit_quantizer(settings: TokenizerSettings) -> Quantizer:
    if settings.chunks > 1 or settings.normalize_codes:
        raise BadRequestError(
            f"quantizer gumbel takes chunks=1 and normalize_codes=false, not {settings.chunks} and "
            f"{str(settings.normalize_codes).lower()}",
            "Set vq.chunks=1 and vq.normalize_codes=false, or vq.quantizer=vq.",
        )
    return LogitQuantizer(settings.codebook_size, settings.embed_dim)


QUANTIZERS: dict[str, Callable[[TokenizerSettings], Quantizer]] = {"vq": _vector_quantizer, "gumbel": _logit_quantizer}
"""The quantizers by the name that the setting `vq.quantizer` gives them."""


def build(settings: TokenizerSettings) -> Quantizer:
    """Return an untrained quantizer.

    Args:
        settings: Settings of the tokenizer: the quantizer's name, codebook size, width and chunks.

    Raises:
        BadRequestError: No quantizer has this name.
    """
    if settings.quantizer not in QUANTIZERS:
        raise BadRequestError(
            f"unknown quantizer {settings.quantizer!r}", f"Known quantizers: {', '.join(QUANTIZERS)}."
        )
    return QUANTIZERS[settings.quantizer](settings)


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
