"""The transformer that every prior shares (section 4.3): code embeddings, pre-LN blocks, one head for all chunks.

Shapes: B batch, N positions, c chunks, K codes, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.settings import CodeShape, PriorSettings

INIT_STD = 0.02
"""GPT-2's, as in VQGAN's transformer."""


class Block(nn.Module):
    """Pre-LN self-attention and MLP, each beside a shortcut."""

    def __init__(self, settings: PriorSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, settings.hidden), nn.GELU(), nn.Linear(settings.hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, W] to the same shape, every position seeing every other."""
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class CodeTransformer(nn.Module):
    """Codes in, logits of every code out; what is visible and in which order is the prior's business.

    One table of (K + 1) x (W / c) embeds all chunks; its last row is the code that is not known (masked). The c
    embeddings of a position are concatenated to its token, the reverse of the tokenizer's cut. A class is one more
    token, after the image's, whose id is looked up in the same table in all chunks.

    Args:
        settings: Layers, heads and widths, and how many classes.
        shape: Grid, chunks and codebook size of the tokenizer's codes.
    """

    def __init__(self, settings: PriorSettings, shape: CodeShape) -> None:
        super().__init__()
        self.settings = settings
        self.shape = shape
        tokens = shape.positions + (1 if settings.classes else 0)
        self.table = nn.Embedding(shape.codebook_size + 1, settings.width // shape.chunks)
        self.position = nn.Parameter(torch.zeros(1, tokens, settings.width))
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, shape.chunks * shape.codebook_size, bias=False)
        self.apply(_initialise)
        nn.init.normal_(self.position, std=INIT_STD)

    @property
    def unknown(self) -> int:
        """K: the id of a code, or of a class, that is not given."""
        return self.shape.codebook_size

    def forward(self, codes: Tensor, classes: Tensor | None = None) -> Tensor:
        """The logits of every code given the visible ones.

        Args:
            codes: [B, h, w, c] int64 in [0, K]; K = unknown.
            classes: [B] int64 in [0, classes) or K = not given; None for an unconditional prior.

        Returns:
            [B, h, w, c, K], in the precision that autocast gives.
        """
        tokens = self.table(codes.flatten(1, 2)).flatten(-2)
        if classes is not None:
            repeated = classes[:, None, None].expand(-1, 1, self.shape.chunks)
            tokens = torch.cat([tokens, self.table(repeated).flatten(-2)], dim=1)
        x = tokens + self.position
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x[:, : self.shape.positions]))
        return logits.view(*codes.shape, self.shape.codebook_size)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
