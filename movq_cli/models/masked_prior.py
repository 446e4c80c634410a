"""The masked prior (equation 6): what is masked in training, its loss, and the parallel decoding loop.

The recipe is MaskGIT's (Chang et al. 2022) with MoVQ's change: each code, not each position, is masked and decided
on its own, so that a prediction sees other positions and other channels of its own position.
Shapes: B batch, h w code grid, c chunks, K codes, N = h w c codes of an image, T decoding steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from movq_cli.models import draws
from movq_cli.models.transformer import CodeTransformer
from movq_cli.settings import CodeShape, SampleSettings

_ROUNDING = 1e-9


class MaskedPrior(CodeTransformer):
    """Predicts the codes that are hidden from those that are not; every code sees every other."""

    def forward(self, codes: Tensor, classes: Tensor | None = None) -> Tensor:
        """The logits of every code given the visible ones.

        Args:
            codes: [B, h, w, c] int64 in [0, K]; K = unknown.
            classes: [B] int64 in [0, classes) or K = not given; None for an unconditional prior.

        Returns:
            [B, h, w, c, K], in the precision that autocast gives.
        """
        x = self.tokens(codes.flatten(1, 2))
        if classes is not None:
            x = torch.cat([x, self.class_tokens(classes)], dim=1)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.logits(x[:, : self.shape.positions]).view(*codes.shape, self.shape.codebook_size)

    def targets(self, images: int, generator: torch.Generator) -> Tensor:
        """Which codes a training step hides and predicts, [B, h, w, c] bool."""
        return training_mask((images, *self.shape.size), generator)

    def inputs(self, codes: Tensor, targets: Tensor) -> Tensor:
        """What is shown of codes [B, h, w, c] that are to be predicted: the others."""
        return codes.masked_fill(targets, self.unknown)

    @torch.inference_mode()
    def decode(
        self,
        seeds: Sequence[int],
        classes: Tensor | None,
        settings: SampleSettings,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw images' codes by parallel decoding: every step draws all codes and keeps the most confident.

        Args:
            seeds: One an image; see draws.
            classes: [B] int64, or None for an unconditional prior.
            settings: Steps, temperatures, truncation, guidance.
            known: [B, h, w, c] int64 in [0, K], K = to be drawn; None = draw everything. Given codes are kept.

        Returns:
            [B, h, w, c] int64 in [0, K).
        """
        device, steps = self.position.device, settings.steps
        size = (len(seeds), *self.shape.size)
        codes = torch.full(size, self.unknown, device=device) if known is None else known.to(device)
        start = (codes == self.unknown).flatten(1).sum(1, keepdim=True)
        if known is not None and not start.any():
            return codes.clone()
        uniforms = draws.image_uniforms(seeds, (steps, 2, self.shape.codes)).to(device)
        for step in range(steps):
            logits = (
                self._first_logits(len(seeds), classes, settings)
                if step == 0 and known is None
                else self._guided_logits(codes, classes, settings, step)
            )
            drawn, log_probability = draws.draw_codes(logits.flatten(1, 3), uniforms[:, step, 0], settings)
            noise = settings.choice_temperature * (1 - (step + 1) / steps)
            confidence = log_probability + noise * draws.gumbel(uniforms[:, step, 1])
            masked = (codes == self.unknown).flatten(1)
            confidence = confidence.masked_fill(~masked, math.inf)  # what is known stays known
            rank = confidence.argsort(1).argsort(1)
            hidden = rank < masked_after(step, steps, start, masked.sum(1, keepdim=True))
            decided = torch.where(masked, drawn, codes.flatten(1))
            codes = decided.masked_fill(hidden, self.unknown).view(size)
        return codes

    def _guided_logits(self, codes: Tensor, classes: Tensor | None, settings: SampleSettings, step: int) -> Tensor:
        rows = draws.guided_rows(len(codes), classes, settings)
        logits = self(draws.repeat_guided(codes, rows), draws.guided_classes(classes, self.unknown, settings))
        return draws.guide(logits, len(codes), settings.guidance_at(step, settings.steps))

    def _first_logits(self, images: int, classes: Tensor | None, settings: SampleSettings) -> Tensor:
        """Of images of which nothing is known yet: the same for all of a class, so passed once for each class."""
        if classes is None:
            different, place = None, torch.zeros(images, dtype=torch.int64, device=self.position.device)
        else:
            different, place = classes.unique(return_inverse=True)
        number = 1 if different is None else len(different)
        nothing = torch.full((number, *self.shape.size), self.unknown, device=self.position.device)
        return self._guided_logits(nothing, different, settings, 0)[place]


def mask_ratio(progress: Tensor) -> Tensor:
    """The cosine schedule: the share of codes still masked at a progress in [0, 1]."""
    return torch.cos(progress * (math.pi / 2))


def training_mask(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Which codes a training step hides: a ratio of its own for each image, each code on its own.

    Args:
        shape: [B, h, w, c].
        generator: On the device that the mask is wanted on.

    Returns:
        [B, h, w, c] bool, True = masked.
    """
    ratio = mask_ratio(torch.rand(shape[0], 1, 1, 1, generator=generator, device=generator.device))
    return torch.rand(*shape, generator=generator, device=generator.device) < ratio


def ratio_mask(ratio: float, seeds: Sequence[int], shape: CodeShape) -> Tensor:
    """Masks for reconstructing images from few of their codes (appendix A): the same number in every channel.

    Args:
        ratio: Share of the positions whose code is hidden in each channel, in [0, 1]; of 256, 0.95 leaves 12 visible.
        seeds: One an image. Of the same seed, what a smaller ratio hides a larger one hides too.
        shape: Of the codes.

    Returns:
        [B, h, w, c] bool on the CPU, True = hidden.
    """
    visible = math.floor(shape.positions * (1 - ratio) + _ROUNDING)
    order = draws.image_uniforms(seeds, (shape.positions, shape.chunks)).argsort(1).argsort(1)
    return (order >= visible).view(len(seeds), *shape.size)


def code_losses(logits: Tensor, codes: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every code, masked or not, in nats, float32 [B, h, w, c].

    Args:
        logits: [B, h, w, c, K].
        codes: [B, h, w, c] int64.
        label_smoothing: Share of the target spread evenly over all K codes.
    """
    flat = logits.flatten(0, -2).float()
    return F.cross_entropy(flat, codes.flatten(), reduction="none", label_smoothing=label_smoothing).view(codes.shape)


def masked_loss(
    logits: Tensor, codes: Tensor, mask: Tensor, label_smoothing: float, count: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the masked codes only, in nats a code, float32.

    Args:
        logits: [B, h, w, c, K].
        codes: [B, h, w, c] int64.
        mask: [B, h, w, c] bool, True = counted.
        label_smoothing: Share of the target spread evenly over all K codes.
        count: Scalar, what the sum is divided by; None = the masked codes.

    Returns:
        Scalar; 0 where nothing is masked.
    """
    # A weighted sum, not a selection: the shapes stay static and the device is not waited for.
    weight = mask.float()
    loss = code_losses(logits, codes, label_smoothing) * weight
    return loss.sum() / (weight.sum() if count is None else count).clamp(min=1)


def masked_after(step: int, steps: int, start: Tensor, now: Tensor) -> Tensor:
    """How many codes stay masked after a step.

    Args:
        step: t in [0, T).
        steps: T.
        start: int64 of any shape: N0, the codes that were unknown at the start, of each image.
        now: The same shape: those that are unknown before this step.

    Returns:
        floor(N0 cos(pi/2 (t + 1)/T)) as int64, but at least 1 and at most all but one of those unknown now, so that no
        step is spent on nothing while there are codes enough; 0 after the last step.
    """
    if step == steps - 1:
        return torch.zeros_like(start)
    share = math.cos(math.pi / 2 * (step + 1) / steps)
    # Where the product is a whole number, rounding leaves it a little below: floor would take one more off.
    masked = (start.double() * share + _ROUNDING).floor().long()
    return masked.minimum(now - 1).clamp(min=1).minimum(now)


def revealed(codes: int, steps: int) -> list[int]:
    """How many codes of an image each of so many steps decides, where nothing is known at the start."""
    start = torch.tensor(codes)
    left = [start]
    for step in range(steps):
        left.append(masked_after(step, steps, start, left[-1]))
    return [int(before - after) for before, after in pairwise(left)]
