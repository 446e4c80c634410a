"""The transformer that every prior shares (section 4.3): code embeddings, pre-LN blocks, one head for all chunks.

Shapes: B batch, N tokens, c chunks, K codes, W width, L tokens that are looked back at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.settings import CodeShape, PriorSettings

INIT_STD = 0.02
"""GPT-2's, as in VQGAN's transformer."""

LOOK_BACK = 128
"""Tokens by which the part of a cache that is looked at grows."""


_ALIGNED = 8
"""Tokens: what is left out of attention comes in rows, which CUDA's kernels copy where they are no multiple of it."""


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

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """Map [B, N, W] to the same shape; causal: each token sees itself and those before it, else all see all."""
        q, k, v = self._project(x)
        return self._finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=causal))

    def step(self, x: Tensor, past: Tensor, place: Tensor, bias: Tensor) -> Tensor:
        """Map the newest token alone, its keys and values being kept for those to come.

        Args:
            x: [B, 1, W].
            past: [2, B, heads, N, W / heads], the keys and the values of the tokens before; the new one's are written
                into it.
            place: [1] int64, the new token's.
            bias: [1, L], 0 for those of the first L tokens that are there by now, -inf for the others.

        Returns:
            [B, 1, W].
        """
        new = self._project(x).to(past.dtype)
        past.index_copy_(3, place, new[1:])
        keys, values = past[:, :, :, : bias.shape[-1]]
        return self._finish(x, F.scaled_dot_product_attention(new[0], keys, values, attn_mask=bias))

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values, [3, B, heads, N, W / heads]."""
        return self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _finish(self, x: Tensor, attention: Tensor) -> Tensor:
        x = x + self.proj(attention.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class CodeTransformer(nn.Module):
    """Codes in, logits of every code out; what is visible and in which order is each prior's own business.

    One table of (K + 1) x (W / c) embeds all chunks; its last row is the code that is not known. The c embeddings of a
    position are concatenated to its token, the reverse of the tokenizer's cut. A class is one more token, whose id is
    looked up in the same table in all chunks.

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

    @property
    def length(self) -> int:
        """Tokens of an image, its class left out."""
        return self.shape.positions

    def compile_blocks(self) -> None:
        """Compile the blocks' whole pass and their step, one program for all of them.

        Not the model's: as many blocks in one program take minutes, and gain no more.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile()
            block.step = torch.compile(block.step)  # type: ignore[method-assign]

    def tokens(self, codes: Tensor) -> Tensor:
        """The tokens [..., W], without their places, of c codes each: [..., c] int64 in [0, K]."""
        return self.table(codes).flatten(-2)

    def class_tokens(self, classes: Tensor) -> Tensor:
        """The tokens [B, 1, W] of classes [B] int64 in [0, classes) or K = not given."""
        return self.tokens(classes[:, None, None].expand(-1, 1, self.shape.chunks))

    def logits(self, x: Tensor) -> Tensor:
        """The logits [..., c, K] of a position's codes, from its token [..., W] after the blocks."""
        return self.head(self.norm(x)).unflatten(-1, (self.shape.chunks, self.shape.codebook_size))

    def chunk_logits(self, x: Tensor) -> Tensor:
        """The logits [..., c, K] of codes that have a token each, [..., c, W] after the blocks."""
        weight = self.head.weight.unflatten(0, (self.shape.chunks, self.shape.codebook_size))
        return torch.einsum("...cw,ckw->...ck", self.norm(x), weight.to(x.dtype))

    def code_logits(self, x: Tensor, chunk: int) -> Tensor:
        """The logits [B, K] of one chunk's code from its token [B, 1, W] after the blocks."""
        size = self.shape.codebook_size
        return F.linear(self.norm(x)[:, 0], self.head.weight[chunk * size : (chunk + 1) * size])


def look_back(place: int, tokens: int) -> int:
    """How many of the first of so many tokens the one at a place looks at.

    Grows by LOOK_BACK at a time: few shapes to record, and few idle reads.
    """
    return min(tokens, (place // LOOK_BACK + 1) * LOOK_BACK)


def aligned(tokens: int) -> int:
    """The places that a past has for so many tokens."""
    return math.ceil(tokens / _ALIGNED) * _ALIGNED


def advance(blocks: Sequence[Block], past: Sequence[Tensor], x: Tensor, place: Tensor, looked_at: int) -> Tensor:
    """Pass the newest token through blocks that remember those before it.

    Args:
        blocks: In their order.
        past: Of each; see Block.step.
        x: [B, 1, W], the token.
        place: [1] int64, its place.
        looked_at: Of the first tokens, at least as many as there are by now; see look_back.

    Returns:
        [B, 1, W].
    """
    places = torch.arange(aligned(looked_at), device=x.device)
    bias = torch.zeros(1, len(places), dtype=past[0].dtype, device=x.device).masked_fill(places > place, -math.inf)
    for block, of_block in zip(blocks, past, strict=True):
        x = block.step(x, of_block, place, bias)
    return x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
