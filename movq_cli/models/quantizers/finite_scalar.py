"""Finite scalar quantization, FSQ (Mentzer et al. 2023): codes without a codebook and without losses.

Shapes: B batch, h w code grid, c chunks, d width of a code (D = c d channels), m channels with levels, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from movq_cli.errors import BadRequestError
from movq_cli.models.quantizer import Quantized, Quantizer
from movq_cli.settings import TokenizerSettings

NAME = "fsq"

_MARGIN = 1e-3
"""Share by which the bounded values stay away from the outer ends of the levels ("eps" in the authors' code)."""


class FiniteScalarQuantizer(Quantizer):
    """Bound each of m channels and round it to one of its L_i levels; a code is the number of all levels together.

    The bound is that of the authors' code (Mentzer et al. 2023, "Finite scalar quantization: VQ-VAE made simple",
    appendix A.1): tanh(z + shift) (L - 1)(1 - eps) / 2 - offset, with an offset of 1/2 for an even number of levels.
    The gradient passes straight through the rounding. A chunk of d > m channels is projected to m channels and back by
    linear layers, which all chunks share; with d = m there are none.

    Args:
        levels: Number of levels of each channel, L_1 ... L_m; their product is K.
        code_dim: Width of a chunk, d.
    """

    levels: Tensor
    """[m] float32: the number of levels of each channel."""
    basis: Tensor
    """[m] int64: the factor of each channel's level in the code."""

    def __init__(self, levels: Sequence[int], code_dim: int) -> None:
        super().__init__()
        self.code_dim = code_dim
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        factors = [math.prod(levels[:channel]) for channel in range(len(levels))]
        self.register_buffer("basis", torch.tensor(factors), persistent=False)
        is_projected = code_dim != len(levels)
        self.project_in = nn.Linear(code_dim, len(levels)) if is_projected else nn.Identity()
        self.project_out = nn.Linear(len(levels), code_dim) if is_projected else nn.Identity()

    def forward(self, z: Tensor) -> Quantized:
        """Quantize features [B, D, h, w]; see Quantizer.forward. There are no losses."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bounded(z)
            rounded = bounded + (bounded.round() - bounded).detach()
            codes = self._codes(rounded)
            vectors = self.project_out(rounded / self._half_width)
        return Quantized(vectors.flatten(-2).permute(0, 3, 1, 2), codes, {})

    def encode(self, z: Tensor) -> Tensor:
        """Return the codes [B, h, w, c] of features [B, D, h, w]."""
        with torch.autocast(z.device.type, enabled=False):
            return self._codes(self._bounded(z))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors [B, D, h, w] of codes [B, h, w, c] in [0, K)."""
        with torch.autocast(self.levels.device.type, enabled=False):
            level = (codes[..., None] // self.basis) % self.levels.long()
            vectors = self.project_out(level / self._half_width - 1)
        return vectors.flatten(-2).permute(0, 3, 1, 2).contiguous()

    @property
    def _half_width(self) -> Tensor:
        """Half the number of levels of each channel, rounded down, [m]: the scale to [-1, 1]."""
        return (self.levels / 2).floor()

    def _bounded(self, z: Tensor) -> Tensor:
        """Return the values before rounding, [B, h, w, c, m] float32, of features [B, D, h, w]."""
        split = self.project_in(z.float().permute(0, 2, 3, 1).unflatten(-1, (-1, self.code_dim)))
        half = (self.levels - 1) * (1 - _MARGIN) / 2
        offset = (self.levels % 2 == 0) * 0.5
        # The authors' shift; it is near atanh(offset / half), by which 0 would be bounded to 0.
        shift = torch.tan(offset / half)
        return torch.tanh(split + shift) * half - offset

    def _codes(self, bounded: Tensor) -> Tensor:
        """Return the codes [B, h, w, c] of bounded values [B, h, w, c, m]."""
        return ((bounded.detach().round() + self._half_width).long() * self.basis).sum(-1)


def build(settings: TokenizerSettings) -> Quantizer:
    """Return an untrained quantizer.

    Raises:
        BadRequestError: The levels are not given, do not fit the codebook size, or the vectors are to have unit length.
    """
    levels, product = settings.fsq_levels, math.prod(settings.fsq_levels)
    if not levels:
        raise BadRequestError(
            "quantizer fsq needs the levels of its channels", "Set vq.fsq_levels, for example to [8, 5, 5, 5]."
        )
    if product != settings.codebook_size:
        raise BadRequestError(
            f"quantizer fsq has {product} codes with fsq_levels {list(levels)}, but codebook_size is "
            f"{settings.codebook_size}",
            f"Set vq.codebook_size={product}, or other levels.",
        )
    if settings.normalize_codes:
        raise BadRequestError("quantizer fsq takes normalize_codes=false", "Set vq.normalize_codes=false.")
    return FiniteScalarQuantizer(levels, settings.code_dim)
