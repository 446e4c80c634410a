"""The quantizer of VQGAN's Gumbel models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from movq_cli.errors import BadRequestError
from movq_cli.models.quantizer import Quantized, Quantizer
from movq_cli.settings import TokenizerSettings

NAME = "gumbel"


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


def build(settings: TokenizerSettings) -> Quantizer:
    """Return an untrained quantizer.

    Raises:
        BadRequestError: There are several chunks, or the vectors are to have unit length.
    """
    if settings.chunks > 1 or settings.normalize_codes:
        raise BadRequestError(
            f"quantizer gumbel takes chunks=1 and normalize_codes=false, not {settings.chunks} and "
            f"{str(settings.normalize_codes).lower()}",
            "Set vq.chunks=1 and vq.normalize_codes=false, or vq.quantizer=vq.",
        )
    return LogitQuantizer(settings.codebook_size, settings.embed_dim)
