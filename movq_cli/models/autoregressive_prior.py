"""The autoregressive prior (equation 5): the order of the codes, and the decoding loop with its cache.

The codes of an image form one sequence of N = h w c: positions row by row, the chunks of a position one after the
other. Code t is predicted from all codes before it.
Shapes: B batch, h w code grid, c chunks, K codes, N = h w c codes of an image, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.models import draws
from movq_cli.models.recorder import Recorder
from movq_cli.models.transformer import INIT_STD, Block, CodeTransformer, advance, aligned, look_back
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings

DEPTH_LAYERS = 2
"""Of DepthPrior's layers, those over the chunks of a position."""


class Decoding(NamedTuple):
    """What the steps of a decoding share; its tensors are changed in place, so that a step can be recorded."""

    settings: SampleSettings
    rows: int
    """Of the batch that the model is passed; see draws.guided_rows."""
    start: int
    """Tokens that stand before the first code's."""
    uniforms: Tensor
    """[B, N] float32: what the codes are drawn with."""
    strengths: Tensor
    """[N] float32, of guidance."""
    past: list[Tensor]
    """Each block's; see Block.step."""
    sequence: Tensor
    """[B, c + N] int64: the codes after a row of c unknown ones."""
    position: Tensor
    """[1] int64, the one whose codes are drawn next."""


class CausalPrior(CodeTransformer):
    """What both share: a token knows which chunk it is of, and training predicts every code.

    Args:
        settings: See CodeTransformer.
        shape: See CodeTransformer.
    """

    def __init__(self, settings: PriorSettings, shape: CodeShape) -> None:
        super().__init__(settings, shape)
        self.channel = nn.Parameter(torch.empty(shape.chunks, settings.width))
        nn.init.normal_(self.channel, std=INIT_STD)
        self.recorder = Recorder()

    @property
    def _body(self) -> list[Block]:
        """The blocks over the tokens."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def targets(self, images: int, generator: torch.Generator) -> Tensor:
        """Which codes a training step predicts: all, [B, h, w, c] bool."""
        return torch.ones(images, *self.shape.size, dtype=torch.bool, device=generator.device)

    def inputs(self, codes: Tensor, targets: Tensor) -> Tensor:
        """What is shown of codes [B, h, w, c] that are to be predicted: all, for each sees only those before it."""
        return codes

    def _begin(
        self, seeds: Sequence[int], classes: Tensor | None, settings: SampleSettings, known: Tensor | None
    ) -> Decoding:
        """A decoding of `decode`'s arguments; the class is in its past."""
        kind = self.position.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.position.dtype
        decoding = self.recorder.keep(
            (len(seeds), classes is None, settings, dtype),
            self.parameters(),
            lambda: self._room(len(seeds), classes, settings, dtype),
        )
        decoding.uniforms.copy_(draws.image_uniforms(seeds, (self.shape.codes,)))
        decoding.sequence.fill_(self.unknown)
        if known is not None:
            decoding.sequence[:, self.shape.chunks :] = known.flatten(1)
        decoding.position.zero_()
        guided = draws.guided_classes(classes, self.unknown, settings)
        if guided is not None:
            x = self.class_tokens(guided) + self.position[:, -1:]
            advance(self._body, decoding.past[: len(self._body)], x, decoding.position, self._looks_back(0))
        return decoding

    def _room(self, images: int, classes: Tensor | None, settings: SampleSettings, dtype: torch.dtype) -> Decoding:
        """What a decoding of so many images needs, before it begins."""
        device, codes = self.position.device, self.shape.codes
        rows, heads = draws.guided_rows(images, classes, settings), self.settings.heads
        past = (2, rows, heads, aligned(self.length + 1), self.settings.width // heads)
        return Decoding(
            settings,
            rows,
            0 if classes is None else 1,
            torch.empty(images, codes, device=device),
            torch.tensor([settings.guidance_at(step, codes) for step in range(codes)], device=device),
            [torch.zeros(past, dtype=dtype, device=device) for _ in self.blocks],
            torch.empty(images, self.shape.chunks + codes, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def _looks_back(self, place: int) -> int:
        """At how many tokens the one at a place looks; there may be a class before the codes."""
        return look_back(place, self.length + 1)

    def _codes(self, decoding: Decoding) -> Tensor:
        """What has been drawn, [B, h, w, c], apart from what the next decoding writes over."""
        return decoding.sequence[:, self.shape.chunks :].unflatten(1, self.shape.size).clone()

    def _draw(self, decoding: Decoding, place: Tensor, logits: Tensor) -> Tensor:
        """Draw the codes [B] at a place of the sequence, [1] int64, where none is given, and put them there."""
        strength = decoding.strengths.index_select(0, place)
        uniforms = decoding.uniforms.index_select(1, place)[:, 0]
        drawn = draws.draw_guided(logits, uniforms, decoding.settings, strength)
        behind = place + self.shape.chunks
        given = decoding.sequence.index_select(1, behind)[:, 0]
        codes = torch.where(given == self.unknown, drawn, given)
        decoding.sequence.index_copy_(1, behind, codes[:, None])
        return codes


class AutoregressivePrior(CausalPrior):
    """Predicts each code from those before it: one token, and one pass through the cache, a code.

    Code t's token is made of the newest code of each chunk: below its own chunk those of its position, the others from
    the position before, and unknown ones where there is none.

    Args:
        settings: See CodeTransformer.
        shape: See CodeTransformer.
    """

    newest: Tensor
    """[N, c] int64: the newest code of each chunk before code t, as a place after a first row of c unknown codes."""

    def __init__(self, settings: PriorSettings, shape: CodeShape) -> None:
        super().__init__(settings, shape)
        before, chunk = torch.arange(shape.codes)[:, None] - 1, torch.arange(shape.chunks)
        self.register_buffer("newest", before - (before - chunk) % shape.chunks + shape.chunks, persistent=False)

    def forward(self, codes: Tensor, classes: Tensor | None = None) -> Tensor:
        """The logits of every code given the ones before it.

        Args:
            codes: [B, h, w, c] int64 in [0, K).
            classes: [B] int64 in [0, classes) or K = not given; None for an unconditional prior.

        Returns:
            [B, h, w, c, K], in the precision that autocast gives.
        """
        shape = self.shape
        x = self.tokens(_after_unknown(codes, self.unknown)[:, self.newest])
        x = x.unflatten(1, (shape.positions, shape.chunks)) + self.position[:, : shape.positions, None] + self.channel
        x = x.flatten(1, 2)
        if classes is not None:
            x = torch.cat([self.class_tokens(classes) + self.position[:, -1:], x], dim=1)
        for block in self.blocks:
            x = block(x, causal=True)
        x = x[:, -shape.codes :].unflatten(1, (shape.positions, shape.chunks))
        return self.chunk_logits(x).view(*codes.shape, shape.codebook_size)

    @property
    def length(self) -> int:
        """Tokens of an image, its class left out."""
        return self.shape.codes

    @torch.inference_mode()
    def decode(
        self,
        seeds: Sequence[int],
        classes: Tensor | None,
        settings: SampleSettings,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw images' codes one after the other.

        Args:
            seeds: One an image; see draws.
            classes: [B] int64, or None for an unconditional prior.
            settings: Temperature, truncation, guidance.
            known: [B, h, w, c] int64 in [0, K], K = to be drawn; None = draw everything. Given codes are kept, and
                seen by those after them.

        Returns:
            [B, h, w, c] int64 in [0, K).
        """
        chunks = self.shape.chunks
        decoding = self._begin(seeds, classes, settings, known)
        for first in range(decoding.start, decoding.start + self.length, chunks):
            looked_at = tuple(self._looks_back(place) for place in range(first, first + chunks))
            self.recorder.run(looked_at, partial(self._draw_position, decoding, looked_at))
        return self._codes(decoding)

    def _draw_position(self, decoding: Decoding, looked_at: Sequence[int]) -> None:
        """Draw the codes of the next position, given how many tokens each looks at."""
        for chunk, of_chunk in enumerate(looked_at):
            place = decoding.position * self.shape.chunks + chunk
            newest = decoding.sequence.index_select(1, self.newest.index_select(0, place)[0])
            where = self.position.index_select(1, decoding.position)
            x = draws.repeat_guided(self.tokens(newest)[:, None] + where + self.channel[chunk], decoding.rows)
            x = advance(self._body, decoding.past, x, place + decoding.start, of_chunk)
            self._draw(decoding, place, self.code_logits(x, chunk))
        decoding.position.add_(1)


class DepthPrior(CausalPrior):
    """The same factorization with fewer passes: a body over positions, and a small one over a position's chunks.

    The body's token at a position is made of all codes of the position before. What comes out is given to each of the
    position's codes, which the last layers predict one after the other from it and the codes before (as the
    RQ-Transformer does, Lee et al. 2022).

    Args:
        settings: See CodeTransformer; DEPTH_LAYERS of the layers are those over the chunks.
        shape: See CodeTransformer.
    """

    def __init__(self, settings: PriorSettings, shape: CodeShape) -> None:
        super().__init__(settings, shape)
        self.body_norm = nn.LayerNorm(settings.width)
        self.previous = nn.Linear(settings.width // shape.chunks, settings.width)
        nn.init.normal_(self.previous.weight, std=INIT_STD)
        nn.init.zeros_(self.previous.bias)

    def forward(self, codes: Tensor, classes: Tensor | None = None) -> Tensor:
        """As AutoregressivePrior.forward."""
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
        """As AutoregressivePrior.decode."""
        decoding = self._begin(seeds, classes, settings, known)
        for place in range(decoding.start, decoding.start + self.length):
            looked_at = self._looks_back(place)
            self.recorder.run(looked_at, partial(self._draw_position, decoding, looked_at))
        return self._codes(decoding)

    def _draw_position(self, decoding: Decoding, looked_at: int) -> None:
        """Draw the codes of the next position, given how many tokens it looks at."""
        position, chunks = decoding.position, self.shape.chunks
        before = decoding.sequence.unflatten(1, (-1, chunks)).index_select(1, position)
        x = draws.repeat_guided(self.tokens(before) + self.position.index_select(1, position), decoding.rows)
        body, inner = decoding.past[:-DEPTH_LAYERS], decoding.past[-DEPTH_LAYERS:]
        x = self.body_norm(advance(self._body, body, x, position + decoding.start, looked_at))
        code = torch.full_like(before[:, 0, 0], self.unknown)
        for chunk in range(chunks):
            newest = draws.repeat_guided(self.previous(self.table(code))[:, None], decoding.rows)
            place = torch.full_like(position, chunk)
            y = advance(self._depth, inner, x + newest + self.channel[chunk], place, chunks)
            code = self._draw(decoding, position * chunks + chunk, self.code_logits(y, chunk))
        position.add_(1)

    @property
    def _body(self) -> list[Block]:
        return [block for block in self.blocks[:-DEPTH_LAYERS] if isinstance(block, Block)]

    @property
    def _depth(self) -> list[Block]:
        return [block for block in self.blocks[-DEPTH_LAYERS:] if isinstance(block, Block)]


def _after_unknown(codes: Tensor, unknown: int) -> Tensor:
    """Codes [B, h, w, c] as sequences [B, c + N], after a row of c unknown ones."""
    return F.pad(codes.flatten(1), (codes.shape[-1], 0), value=unknown)
