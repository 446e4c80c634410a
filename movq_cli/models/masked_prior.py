"""The masked prior (equation 6): what is masked in training, its loss, and the parallel decoding loop.

The recipe is MaskGIT's (Chang et al. 2022) with MoVQ's change: each code, not each position, is masked and decided
on its own, so that a prediction sees other positions and other channels of its own position.
Shapes: B batch, h w code grid, c chunks, K codes, N = h w c codes of an image, T decoding steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from movq_cli.models import draws
from movq_cli.models.transformer import CodeTransformer
from movq_cli.settings import SampleSettings

_ROUNDING = 1e-9


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


@torch.inference_mode()
def decode(
    model: CodeTransformer,
    seeds: Sequence[int],
    classes: Tensor | None,
    settings: SampleSettings,
    known: Tensor | None = None,
) -> Tensor:
    """Draw images' codes by parallel decoding: every step draws all codes and keeps the most confident.

    Args:
        model: The masked prior, in eval mode.
        seeds: One an image; see draws.
        classes: [B] int64, or None for an unconditional prior.
        settings: Steps, temperatures, guidance.
        known: [B, h, w, c] int64 in [0, K], K = to be drawn; None = draw everything. Given codes are kept.

    Returns:
        [B, h, w, c] int64 in [0, K).
    """
    shape, device = model.shape, model.position.device
    size = (len(seeds), shape.height, shape.width, shape.chunks)
    codes = torch.full(size, model.unknown, device=device) if known is None else known.to(device)
    uniforms = draws.image_uniforms(seeds, (settings.steps, 2, shape.codes)).to(device)
    start = (codes == model.unknown).flatten(1).sum(1, keepdim=True)
    for step in range(settings.steps):
        logits = guided_logits(model, codes, classes, settings.guidance).flatten(1, 3)
        drawn, log_probability = draws.draw_codes(logits, uniforms[:, step, 0], settings.temperature)
        noise = settings.choice_temperature * (1 - (step + 1) / settings.steps)
        confidence = log_probability + noise * draws.gumbel(uniforms[:, step, 1])
        masked = (codes == model.unknown).flatten(1)
        confidence = confidence.masked_fill(~masked, math.inf)  # what is known stays known
        rank = confidence.argsort(1).argsort(1)
        hidden = rank < masked_after(step, settings.steps, start, masked.sum(1, keepdim=True))
        decided = torch.where(masked, drawn, codes.flatten(1))
        codes = decided.masked_fill(hidden, model.unknown).view(size)
    return codes


def guided_logits(model: CodeTransformer, codes: Tensor, classes: Tensor | None, guidance: float) -> Tensor:
    """Logits, moved away from the unconditional ones by classifier-free guidance (Ho & Salimans 2022).

    Args:
        model: The prior.
        codes: [B, h, w, c].
        classes: [B], or None.
        guidance: g: logits = conditional + g (conditional - unconditional); 0 = off, one pass.

    Returns:
        [B, h, w, c, K].
    """
    if classes is None or guidance == 0:
        return model(codes, classes)
    both = torch.cat([classes, torch.full_like(classes, model.unknown)])
    conditional, unconditional = model(codes.repeat(2, 1, 1, 1), both).float().chunk(2)
    return conditional + guidance * (conditional - unconditional)
