"""The transformer that every prior shares (section 4.3): code embeddings, pre-LN blocks, one head for all chunks.

Shapes: B batch, N tokens, c chunks, K codes, W width, L tokens of the KV cache that attention reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from movq_cli.settings import CodeShape, PriorSettings

INIT_STD = 0.02
"""Standard deviation of the initial weights: that of GPT-2 and of VQGAN's transformer."""

CACHE_INCREMENT = 128
"""Number of tokens by which the part of the KV cache that attention reads grows."""

_NORM_EPS = 1e-6

_ALIGNMENT = 8
"""The cache's length is a multiple of this number of tokens: CUDA's attention kernels copy any other attention mask."""


_REPRODUCIBLE = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


class HeadNorm(nn.RMSNorm):
    """Normalization of the queries or of the keys of each head to a root mean square of 1, times a learned scale.

    This is the QK-norm of Dehghani et al. 2023, "Scaling vision transformers to 22 billion parameters", section 2: the
    logits of attention cannot grow without limit. Their LayerNorm has neither centering nor bias.

    Args:
        width: Width of a head, d.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., d] of any float type, which the result has too; it is computed in the type of the scale."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Block(nn.Module):
    """Pre-LN self-attention and MLP, each with a residual connection, and in training with dropout before it."""

    def __init__(self, settings: PriorSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, settings.hidden), nn.GELU(), nn.Linear(settings.hidden, width))
        self.dropout = nn.Dropout(settings.dropout)
        self.has_qk_norm = settings.qk_norm
        if settings.qk_norm:
            self.q_norm, self.k_norm = (HeadNorm(width // settings.heads) for _ in range(2))

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """Map [B, N, W] to the same shape; if causal, no token attends to those after it, else all attend to all."""
        q, k, v = self._project(x)
        return self._finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=causal))

    def step(self, x: Tensor, cache: Tensor, index: Tensor, bias: Tensor) -> Tensor:
        """Map the newest token alone, with the KV cache of the tokens before it.

        Args:
            x: Newest token, [B, 1, W].
            cache: Keys and values of the tokens, [2, B, heads, N, W / heads]; those of the newest token are written
                into it.
            index: Index of the newest token, [1] int64.
            bias: Attention bias, [1, L]: 0 for the tokens up to the newest, -inf for the rest of the first L.

        Returns:
            [B, 1, W].
        """
        new = self._project(x).to(cache.dtype)
        cache.index_copy_(3, index, new[1:])
        keys, values = cache[:, :, :, : bias.shape[-1]]
        return self._finish(x, F.scaled_dot_product_attention(new[0], keys, values, attn_mask=bias))

    def _project(self, x: Tensor) -> Tensor:
        """Return queries, keys and values, [3, B, heads, N, W / heads]."""
        projected = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if not self.has_qk_norm:
            return projected
        q, k, v = projected
        return torch.stack([self.q_norm(q), self.k_norm(k), v])

    def _finish(self, x: Tensor, attention: Tensor) -> Tensor:
        x = x + self.dropout(self.proj(attention.transpose(1, 2).flatten(-2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class CodeTransformer(nn.Module):
    """The embeddings, blocks and head of a prior; each prior decides which codes are visible, and in which order.

    One table of (K + 1) x (W / c) embeds the codes of all chunks; its last row is the unknown code. The c embeddings of
    a position are concatenated to its token, as the tokenizer's chunks are concatenated to its channels. A class is one
    more token: its id is looked up in the same table, once for each chunk. If there are more classes than codes, the
    classes from K on have rows of their own, after the row of the unknown code.

    Args:
        settings: Number of layers, heads and classes, and the widths.
        shape: Grid, chunks and codebook size of the tokenizer's codes.
    """

    def __init__(self, settings: PriorSettings, shape: CodeShape) -> None:
        super().__init__()
        self.settings = settings
        self.shape = shape
        tokens = shape.positions + (1 if settings.classes else 0)
        rows = max(shape.codebook_size, settings.classes) + 1
        self.table = nn.Embedding(rows, settings.width // shape.chunks)
        self.position = nn.Parameter(torch.zeros(1, tokens, settings.width))
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, shape.chunks * shape.codebook_size, bias=False)
        self.apply(_initialise)
        nn.init.normal_(self.position, std=INIT_STD)

    @property
    def unknown(self) -> int:
        """The id of an unknown code, K."""
        return self.shape.codebook_size

    @property
    def no_class(self) -> int:
        """The class id of an image without a class: K, or the number of classes if it is larger."""
        return max(self.shape.codebook_size, self.settings.classes)

    @property
    def length(self) -> int:
        """The number of tokens of an image, without the class token."""
        return self.shape.positions

    def compile_blocks(self) -> None:
        """Compile the forward pass and the step of the blocks, as one program that all blocks share.

        Compiling the complete model, a program with all blocks in it, takes minutes and is not faster.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile()
            block.step = torch.compile(block.step)  # type: ignore[method-assign]

    def tokens(self, codes: Tensor) -> Tensor:
        """Return tokens [..., W], without position embedding, from their c codes, [..., c] int64 in [0, K]."""
        return self.table(codes).flatten(-2)

    def class_tokens(self, classes: Tensor) -> Tensor:
        """Return tokens [B, 1, W] of class ids, [B] int64 in [0, classes), or `no_class`."""
        if self.no_class > self.unknown:  # Row K is that of no class, and the classes from K on follow it.
            beyond = torch.where(classes == self.no_class, self.unknown, classes + 1)
            classes = torch.where(classes < self.unknown, classes, beyond)
        return self.tokens(classes[:, None, None].expand(-1, 1, self.shape.chunks))

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [..., c, K] of a position's codes from its token [..., W] after the blocks."""
        return self.head(self.norm(x)).unflatten(-1, (self.shape.chunks, self.shape.codebook_size))

    def chunk_logits(self, x: Tensor) -> Tensor:
        """Return the logits [..., c, K] of codes that have a token each, [..., c, W] after the blocks."""
        weight = self.head.weight.unflatten(0, (self.shape.chunks, self.shape.codebook_size))
        return torch.einsum("...cw,ckw->...ck", self.norm(x), weight.to(x.dtype))

    def code_logits(self, x: Tensor, chunk: int) -> Tensor:
        """Return the logits [B, K] of one chunk's code from its token [B, 1, W] after the blocks."""
        size = self.shape.codebook_size
        return F.linear(self.norm(x)[:, 0], self.head.weight[chunk * size : (chunk + 1) * size])


def cache_length(index: int, tokens: int) -> int:
    """Return how many tokens of the KV cache attention reads for the token at an index, out of `tokens` in all.

    The length grows by CACHE_INCREMENT, a compromise between the number of shapes, each of which is recorded as a CUDA
    graph, and the number of tokens that are read but masked.
    """
    return min(tokens, (index // CACHE_INCREMENT + 1) * CACHE_INCREMENT)


def aligned_length(tokens: int) -> int:
    """Return the length of a KV cache for this number of tokens: rounded up to a multiple of the alignment."""
    return math.ceil(tokens / _ALIGNMENT) * _ALIGNMENT


def reproducible_attention() -> AbstractContextManager[None]:
    """Return a context in which attention gives the same bits each time, so that a seed gives the same image.

    cuDNN's kernel does not: PyTorch 2.11 selects it on an H200 for a query with a mask, and two runs with the same
    seeds drew different codes.
    """
    return sdpa_kernel(list(_REPRODUCIBLE))


def step_blocks(blocks: Sequence[Block], caches: Sequence[Tensor], x: Tensor, index: Tensor, length: int) -> Tensor:
    """Map the newest token through blocks with KV caches.

    Args:
        blocks: Blocks, in their order.
        caches: KV cache of each block; see Block.step.
        x: Newest token, [B, 1, W].
        index: Index of the newest token, [1] int64.
        length: Number of tokens of the cache that attention reads, larger than the index; see cache_length.

    Returns:
        [B, 1, W].
    """
    indices = torch.arange(aligned_length(length), device=x.device)
    bias = torch.zeros(1, len(indices), dtype=caches[0].dtype, device=x.device).masked_fill(indices > index, -math.inf)
    with reproducible_attention():
        for block, cache in zip(blocks, caches, strict=True):
            x = block.step(x, cache, index, bias)
    return x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
