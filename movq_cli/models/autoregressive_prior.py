"""The autoregressive prior (equation 5): the order of the codes, and the decoding loop with its cache.

The codes of an image form one sequence of N = h w c: positions row by row, the chunks of a position one after the
other. Code t is predicted from all codes before it.
Shapes: B batch, h w code grid, c chunks, K codes, N = h w c codes of an image, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.models import draws
from movq_cli.models.transformer import INIT_STD, Block, CodeTransformer, KeyValues, advance, empty_past
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings

DEPTH_LAYERS = 2
"""Of DepthPrior's layers, those over the chunks of a position."""


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

    def targets(self, images: int, generator: torch.Generator) -> Tensor:
        """Which codes a training step predicts: all, [B, h, w, c] bool."""
        return torch.ones(images, *self.shape.size, dtype=torch.bool, device=generator.device)

    def inputs(self, codes: Tensor, targets: Tensor) -> Tensor:
        """What is shown of codes [B, h, w, c] that are to be predicted: all, for each sees only those before it."""
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
        given, uniforms = _begin(self, seeds, known)
        rows = draws.guided_rows(len(seeds), classes, settings)
        sequence = _after_unknown(given, self.unknown)
        past = empty_past(self._blocks, rows, self.shape.codes + 1, self.position)
        start = _pass_class(self, self._blocks, past, draws.guided_classes(classes, self.unknown, settings))
        for t in range(self.shape.codes):
            position, chunk = divmod(t, self.shape.chunks)
            x = self.tokens(sequence[:, self.newest[t]])[:, None] + self.position[:, position] + self.channel[chunk]
            x = advance(self._blocks, past, draws.repeat_guided(x, rows), start + t)
            drawn = draws.draw_guided(self.code_logits(x, chunk), uniforms[:, t], settings, t, self.shape.codes)
            place = sequence[:, self.shape.chunks + t]
            place.copy_(torch.where(place == self.unknown, drawn, place))
        return sequence[:, self.shape.chunks :].view(given.shape)

    @property
    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


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
        given, uniforms = _begin(self, seeds, known)
        rows, shape = draws.guided_rows(len(seeds), classes, settings), self.shape
        sequence = _after_unknown(given, self.unknown).unflatten(1, (-1, shape.chunks))
        past = empty_past(self._body, rows, shape.positions + 1, self.position)
        start = _pass_class(self, self._body, past, draws.guided_classes(classes, self.unknown, settings))
        for position in range(shape.positions):
            x = self.tokens(sequence[:, position])[:, None] + self.position[:, position]
            body = self.body_norm(advance(self._body, past, draws.repeat_guided(x, rows), start + position))
            inner = empty_past(self._depth, rows, shape.chunks, self.position)
            code = torch.full_like(sequence[:, 0, 0], self.unknown)
            for chunk in range(shape.chunks):
                before = draws.repeat_guided(self.previous(self.table(code))[:, None], rows)
                y = advance(self._depth, inner, body + before + self.channel[chunk], chunk)
                t = position * shape.chunks + chunk
                drawn = draws.draw_guided(self.code_logits(y, chunk), uniforms[:, t], settings, t, shape.codes)
                place = sequence[:, position + 1, chunk]
                code = torch.where(place == self.unknown, drawn, place)
                place.copy_(code)
        return sequence[:, 1:].reshape(given.shape)

    @property
    def _body(self) -> list[Block]:
        return [block for block in self.blocks[:-DEPTH_LAYERS] if isinstance(block, Block)]

    @property
    def _depth(self) -> list[Block]:
        return [block for block in self.blocks[-DEPTH_LAYERS:] if isinstance(block, Block)]


def _after_unknown(codes: Tensor, unknown: int) -> Tensor:
    """Codes [B, h, w, c] as sequences [B, c + N], after a row of c unknown ones."""
    return F.pad(codes.flatten(1), (codes.shape[-1], 0), value=unknown)


def _begin(model: CodeTransformer, seeds: Sequence[int], known: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is known of the images' codes [B, h, w, c], and the uniform numbers [B, N] to draw the rest with."""
    device = model.position.device
    size = (len(seeds), *model.shape.size)
    given = torch.full(size, model.unknown, device=device) if known is None else known.to(device)
    return given, draws.image_uniforms(seeds, (model.shape.codes,)).to(device)


def _pass_class(model: CodeTransformer, blocks: list[Block], past: list[KeyValues], classes: Tensor | None) -> int:
    """Pass the class token into the cache; the number of tokens that stand before the first code."""
    if classes is None:
        return 0
    advance(blocks, past, model.class_tokens(classes) + model.position[:, -1:], 0)
    return 1
