"""The autoregressive priors (equation 5): the order of the codes, and the decoding loop with its KV cache.

The codes of an image form a sequence of N = h w c: the positions row by row, and the chunks of a position one after
another. Code t is predicted from all codes before it.
Shapes: B batch, h w code grid, c chunks, K codes, N = h w c codes of an image, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.errors import BadRequestError
from movq_cli.models import draws
from movq_cli.models.code_prior import CodePrior
from movq_cli.models.cuda_graphs import GraphRecorder
from movq_cli.models.transformer import INIT_STD, Block, aligned_length, cache_length, step_blocks
from movq_cli.setting_types import MaskSchedule
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings
from movq_cli.training_settings import TrainPriorSettings

DEPTH_LAYERS = 2
"""Number of DepthPrior's layers that work over the chunks of a position."""


class Decoding(NamedTuple):
    """The state that the steps of a decoding share; its tensors change in place, so that steps can be recorded."""

    settings: SampleSettings
    rows: int
    """Batch size of the model; see draws.guided_rows."""
    start: int
    """Number of tokens before that of the first code: 1 with a class, else 0."""
    uniforms: Tensor
    """[B, N] float32: uniform random number of each code."""
    strengths: Tensor
    """[N] float32: strength of guidance of each code."""
    caches: list[Tensor]
    """KV cache of each block; see Block.step."""
    sequence: Tensor
    """[B, c + N] int64: c unknown codes, then the codes of the image."""
    position: Tensor
    """[1] int64: index of the position whose codes are drawn next."""


class CausalPrior(CodePrior):
    """The common part of both priors: tokens have a chunk embedding, and training predicts every code.

    Args:
        settings: Sizes of the transformer; see CodeTransformer.
        shape: Shape of the tokenizer's codes.
    """

    decoding = "draws one code after another"
    unused_sample_settings = frozenset({"steps", "choice_temperature", "order", "mask_schedule"})
    unused_training_settings = frozenset({"mask_schedule"})

    def __init__(self, settings: PriorSettings, shape: CodeShape) -> None:
        super().__init__(settings, shape)
        self.channel = nn.Parameter(torch.empty(shape.chunks, settings.width))
        nn.init.normal_(self.channel, std=INIT_STD)
        self.recorder = GraphRecorder()

    @property
    def _body(self) -> list[Block]:
        """The blocks that work over the sequence of tokens."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def targets(self, images: int, generator: torch.Generator, schedule: MaskSchedule = "cosine") -> Tensor:
        """Return the codes that a training step predicts, which are all: ones, [B, h, w, c] bool."""
        return torch.ones(images, *self.shape.size, dtype=torch.bool, device=generator.device)

    def inputs(self, codes: Tensor, targets: Tensor) -> Tensor:
        """Return the codes as they are: `forward` predicts each code from those before it."""
        return codes

    def validation_metrics(self, loss: float, loss_by_target_share: Sequence[float]) -> Mapping[str, Any]:
        """Return the loss in bits, the code length of an exact factorization."""
        return {"bits_per_code": loss / math.log(2)}

    def _begin(
        self, seeds: Sequence[int], classes: Tensor | None, settings: SampleSettings, known: Tensor | None
    ) -> Decoding:
        """Return the state at the start of `decode`; the class token is in its KV caches."""
        kind = self.position.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.position.dtype
        decoding = self.recorder.reuse(
            (len(seeds), classes is None, settings, dtype),
            self.parameters(),
            lambda: self._allocate(len(seeds), classes, settings, dtype),
        )
        decoding.uniforms.copy_(draws.image_uniforms(seeds, (self.shape.codes,)))
        decoding.sequence.fill_(self.unknown)
        if known is not None:
            decoding.sequence[:, self.shape.chunks :] = known.flatten(1)
        decoding.position.zero_()
        # Also a code without guidance is in the KV cache of both rows, because later codes may have guidance.
        guided = draws.guided_classes(classes, self.no_class, settings.guidance)
        if guided is not None:
            x = self.class_tokens(guided) + self.position[:, -1:]
            caches = decoding.caches[: len(self._body)]
            step_blocks(self._body, caches, x, decoding.position, self._cache_length(0))
        return decoding

    def _allocate(self, images: int, classes: Tensor | None, settings: SampleSettings, dtype: torch.dtype) -> Decoding:
        """Allocate the state of a decoding."""
        device, codes = self.position.device, self.shape.codes
        rows, heads = draws.guided_rows(images, classes, settings.guidance), self.settings.heads
        cache = (2, rows, heads, aligned_length(self.length + 1), self.settings.width // heads)
        return Decoding(
            settings,
            rows,
            0 if classes is None else 1,
            torch.empty(images, codes, device=device),
            torch.tensor([settings.guidance_at(step, codes) for step in range(codes)], device=device),
            [torch.zeros(cache, dtype=dtype, device=device) for _ in self.blocks],
            torch.empty(images, self.shape.chunks + codes, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def _cache_length(self, index: int) -> int:
        """Return how many cached tokens the token at an index reads; one more than the codes' may be the class's."""
        return cache_length(index, self.length + 1)

    def _codes(self, decoding: Decoding) -> Tensor:
        """Return a copy of the drawn codes, [B, h, w, c], since the next decoding overwrites the state."""
        return decoding.sequence[:, self.shape.chunks :].unflatten(1, self.shape.size).clone()

    def _draw(self, decoding: Decoding, index: Tensor, logits: Tensor) -> Tensor:
        """Return the codes [B] at an index of the sequence, [1] int64: the known code, or else one that is drawn."""
        strength = decoding.strengths.index_select(0, index)
        uniforms = decoding.uniforms.index_select(1, index)[:, 0]
        drawn = draws.draw_guided(logits, uniforms, decoding.settings, strength)
        column = index + self.shape.chunks
        known = decoding.sequence.index_select(1, column)[:, 0]
        codes = torch.where(known == self.unknown, drawn, known)
        decoding.sequence.index_copy_(1, column, codes[:, None])
        return codes


class AutoregressivePrior(CausalPrior):
    """A prior with one token for each code, which is predicted from the codes before it; decoding takes N steps.

    The token of code t embeds the newest code of each chunk: of the chunks before its own, the code of its position; of
    the others, the code of the position before, or the unknown code at the first position.

    Args:
        settings: Sizes of the transformer; see CodeTransformer.
        shape: Shape of the tokenizer's codes.
    """

    run_suffix = "auto"

    newest: Tensor
    """[N, c] int64: index of the newest code of each chunk before code t, after c unknown codes in front."""
    previous: nn.Parameter | None
    """[1, h w, W]: embedding of the position before the token's own in the order; None unless orders are permuted."""

    def __init__(self, settings: PriorSettings, shape: CodeShape) -> None:
        super().__init__(settings, shape)
        self.register_parameter("previous", None)
        before, chunk = torch.arange(shape.codes)[:, None] - 1, torch.arange(shape.chunks)
        self.register_buffer("newest", before - (before - chunk) % shape.chunks + shape.chunks, persistent=False)

    def prepare_training(self, settings: TrainPriorSettings) -> None:
        """Add the embedding of the position before in the order, if the training permutes the order.

        RAR (Yu et al. 2024) adds to a token the embeddings of the position whose code it reads and, target-aware, of
        the position that it predicts. `position` is that of the predicted code already; this adds the other one.
        """
        if settings.random_order is not None:
            self.previous = nn.Parameter(torch.empty_like(self.position[:, : self.shape.positions]))
            nn.init.normal_(self.previous, std=INIT_STD)

    def for_inference(self) -> AutoregressivePrior:
        """Return the prior of the raster order alone, whose position embedding is the sum of both."""
        if self.previous is None:
            return self
        merged = copy(self)
        merged._parameters = dict(self._parameters)
        merged.recorder = GraphRecorder()
        indices = torch.arange(self.shape.positions, device=self.position.device)
        merged.position = nn.Parameter(self.position.detach().clone())
        merged.position.data[:, : self.shape.positions] = self._raster_position(indices).detach()
        merged.previous = None
        return merged

    def _raster_position(self, indices: Tensor) -> Tensor:
        """Return the embeddings [1, n, W] of positions [n] int64 in raster order."""
        position = self.position.index_select(1, indices)
        if self.previous is None:
            return position
        before = self.previous.index_select(1, (indices - 1).clamp(min=0))
        return position + before * (indices > 0)[:, None]

    def _permuted_position(self, order: Tensor) -> Tensor:
        """Return the embeddings [B, h w, W] of positions in the orders [B, h w] int64."""
        assert self.previous is not None
        return self.position[0][order] + F.pad(self.previous[0][order[:, :-1]], (0, 0, 1, 0))

    def forward(self, codes: Tensor, classes: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """Return the logits of every code given the codes before it; see CodePrior.forward.

        Args:
            codes: Codes, [B, h, w, c] int64.
            classes: Class ids, [B] int64; None for an unconditional prior.
            order: Order of the positions of each image, [B, h w] int64, after `prepare_training`; None is the raster
                order. The chunks of a position stay together, in their own order.
        """
        shape = self.shape
        if order is not None:
            position = self._permuted_position(order)
            codes = codes.flatten(1, 2).take_along_dim(order[..., None], 1).view(codes.shape)
        elif self.previous is None:
            position = self.position[:, : shape.positions]
        else:
            position = self._raster_position(torch.arange(shape.positions, device=codes.device))
        x = self.tokens(_after_unknown(codes, self.unknown)[:, self.newest])
        x = x.unflatten(1, (shape.positions, shape.chunks)) + position[:, :, None] + self.channel
        x = x.flatten(1, 2)
        if classes is not None:
            x = torch.cat([self.class_tokens(classes) + self.position[:, -1:], x], dim=1)
        for block in self.blocks:
            x = block(x, causal=True)
        x = x[:, -shape.codes :].unflatten(1, (shape.positions, shape.chunks))
        if order is not None:
            x = x.take_along_dim(order.argsort(1)[..., None, None], 1)
        return self.chunk_logits(x).view(*codes.shape, shape.codebook_size)

    @property
    def length(self) -> int:
        """The number of tokens of an image, without the class token."""
        return self.shape.codes

    @torch.inference_mode()
    def decode(
        self,
        seeds: Sequence[int],
        classes: Tensor | None,
        settings: SampleSettings,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw the codes of images one after another; see CodePrior.decode.

        A drawn code depends on the known codes before it, and not on those after it.
        """
        chunks = self.shape.chunks
        decoding = self._begin(seeds, classes, settings, known)
        for first in range(decoding.start, decoding.start + self.length, chunks):
            lengths = tuple(self._cache_length(index) for index in range(first, first + chunks))
            self.recorder.run(lengths, partial(self._draw_position, decoding, lengths))
        return self._codes(decoding)

    def _draw_position(self, decoding: Decoding, lengths: Sequence[int]) -> None:
        """Draw the codes of the next position, whose tokens read `lengths` tokens of the KV cache."""
        for chunk, length in enumerate(lengths):
            index = decoding.position * self.shape.chunks + chunk
            newest = decoding.sequence.index_select(1, self.newest.index_select(0, index)[0])
            position = self._raster_position(decoding.position)
            x = draws.repeat_guided(self.tokens(newest)[:, None] + position + self.channel[chunk], decoding.rows)
            x = step_blocks(self._body, decoding.caches, x, index + decoding.start, length)
            self._draw(decoding, index, self.code_logits(x, chunk))
        decoding.position.add_(1)


class DepthPrior(CausalPrior):
    """A prior of the same factorization that is cheaper to sample: a deep body over positions, two layers over chunks.

    The body's token at a position embeds all codes of the position before. Its output goes to each code of the
    position; the last layers predict these codes one after another from it and the codes before them, as in the
    RQ-Transformer (Lee et al. 2022).

    Args:
        settings: Sizes of the transformer, of whose layers DEPTH_LAYERS work over the chunks; see CodeTransformer.
        shape: Shape of the tokenizer's codes.
    """

    run_suffix = "depth"
    unused_training_settings = frozenset({"mask_schedule", "random_order"})

    @classmethod
    def check_settings(cls, settings: PriorSettings) -> None:
        """Check that layers are left for the body.

        Raises:
            BadRequestError: There are too few layers.
        """
        if settings.layers <= DEPTH_LAYERS:
            raise BadRequestError(
                f"prior.mode=depth needs at least {DEPTH_LAYERS + 1} layers, {DEPTH_LAYERS} of them over the chunks, "
                f"not {settings.layers}",
                f"Set -o prior.layers={DEPTH_LAYERS + 1} or more.",
            )

    def __init__(self, settings: PriorSettings, shape: CodeShape) -> None:
        super().__init__(settings, shape)
        self.body_norm = nn.LayerNorm(settings.width)
        self.previous = nn.Linear(settings.width // shape.chunks, settings.width)
        nn.init.normal_(self.previous.weight, std=INIT_STD)
        nn.init.zeros_(self.previous.bias)

    def forward(self, codes: Tensor, classes: Tensor | None = None) -> Tensor:
        """Return the logits of every code given the codes before it; see CodePrior.forward."""
        shape = self.shape
        grid = codes.flatten(1, 2)
        x = self.tokens(F.pad(grid[:, :-1], (0, 0, 1, 0), value=self.unknown)) + self.position[:, : shape.positions]
        if classes is not None:
            x = torch.cat([self.class_tokens(classes) + self.position[:, -1:], x], dim=1)
        for block in self._body:
            x = block(x, causal=True)
        body = self.body_norm(x[:, -shape.positions :])
        before = self.previous(self.table(F.pad(grid[..., :-1], (1, 0), value=self.unknown)))
        y = (body[:, :, None] + before + self.channel).flatten(0, 1)
        for block in self._depth:
            y = block(y, causal=True)
        return self.chunk_logits(y).view(*codes.shape, shape.codebook_size)

    @torch.inference_mode()
    def decode(
        self,
        seeds: Sequence[int],
        classes: Tensor | None,
        settings: SampleSettings,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw the codes of images one after another; see AutoregressivePrior.decode."""
        decoding = self._begin(seeds, classes, settings, known)
        for index in range(decoding.start, decoding.start + self.length):
            length = self._cache_length(index)
            self.recorder.run(length, partial(self._draw_position, decoding, length))
        return self._codes(decoding)

    def _draw_position(self, decoding: Decoding, length: int) -> None:
        """Draw the codes of the next position, whose token reads `length` tokens of the KV cache."""
        position, chunks = decoding.position, self.shape.chunks
        before = decoding.sequence.unflatten(1, (-1, chunks)).index_select(1, position)
        x = draws.repeat_guided(self.tokens(before) + self.position.index_select(1, position), decoding.rows)
        body, depth = decoding.caches[:-DEPTH_LAYERS], decoding.caches[-DEPTH_LAYERS:]
        x = self.body_norm(step_blocks(self._body, body, x, position + decoding.start, length))
        code = torch.full_like(before[:, 0, 0], self.unknown)
        for chunk in range(chunks):
            newest = draws.repeat_guided(self.previous(self.table(code))[:, None], decoding.rows)
            index = torch.full_like(position, chunk)
            y = step_blocks(self._depth, depth, x + newest + self.channel[chunk], index, chunks)
            code = self._draw(decoding, position * chunks + chunk, self.code_logits(y, chunk))
        position.add_(1)

    @property
    def _body(self) -> list[Block]:
        return [block for block in self.blocks[:-DEPTH_LAYERS] if isinstance(block, Block)]

    @property
    def _depth(self) -> list[Block]:
        return [block for block in self.blocks[-DEPTH_LAYERS:] if isinstance(block, Block)]


def _after_unknown(codes: Tensor, unknown: int) -> Tensor:
    """Return codes [B, h, w, c] as sequences [B, c + N] that begin with c unknown codes."""
    return F.pad(codes.flatten(1), (codes.shape[-1], 0), value=unknown)
