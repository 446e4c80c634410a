"""The masked prior (equation 6): the mask of a training step, the loss, and the parallel decoding loop.

The recipe is MaskGIT's (Chang et al. 2022) with MoVQ's change: each code, not each position, is masked and decided
independently, so that a prediction uses other positions and the other channels of its own position.
Shapes: B batch, h w code grid, c chunks, K codes, N = h w c codes of an image, T decoding steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from movq_cli.errors import BadRequestError
from movq_cli.models import draws
from movq_cli.models.code_prior import CodePrior
from movq_cli.models.halton import halton_ranks
from movq_cli.models.transformer import reproducible_attention
from movq_cli.setting_types import MaskSchedule
from movq_cli.settings import CodeShape, SampleSettings

_ROUNDING = 1e-9
"""Added before rounding down, so that a product that is a whole number in exact arithmetic is not rounded below it."""

Order = Callable[[Tensor, Tensor, int, SampleSettings, CodeShape], Tensor]
"""A decoding order.

Args:
    log_probability: Natural logarithm of the probability of each drawn code, [B, N] float32.
    uniforms: Uniform random numbers in [0, 1) for each code of this step, [B, N] float32.
    step: Index of the decoding step, t in [0, T).
    settings: Settings of the sampler.
    shape: Shape of the codes of an image, whose N codes are in the order of [h, w, c].

Returns:
    Scores [B, N]: after the step, the unknown codes with the lowest scores are masked again.
"""


def confidence(
    log_probability: Tensor, uniforms: Tensor, step: int, settings: SampleSettings, shape: CodeShape
) -> Tensor:
    """Decide likely codes first: log p + tau (1 - (t + 1) / T) Gumbel noise, tau being `choice_temperature`."""
    noise = settings.choice_temperature * (1 - (step + 1) / settings.steps)
    return log_probability + noise * draws.gumbel(uniforms)


def halton(log_probability: Tensor, uniforms: Tensor, step: int, settings: SampleSettings, shape: CodeShape) -> Tensor:
    """Decide codes that lie far apart, the same ones in every image: see halton.halton_ranks."""
    # Exact in float32, because an image has far fewer than 2^24 codes.
    return -halton_ranks(shape).to(uniforms).expand(uniforms.shape)


def random(log_probability: Tensor, uniforms: Tensor, step: int, settings: SampleSettings, shape: CodeShape) -> Tensor:
    """Decide a uniformly random subset of the unknown codes, as they are masked in training."""
    return uniforms


ORDERS: dict[str, Order] = {"confidence": confidence, "halton": halton, "random": random}
"""The decoding orders by the name that the setting `sample.order` gives them."""


class MaskedPrior(CodePrior):
    """A prior that predicts masked codes from the visible ones; every code attends to every other code."""

    run_suffix = "prior"
    decoding = "draws codes in parallel steps"
    # Decoding drops the unlikely codes that smoothing makes likelier; other priors keep every code that they draw.
    label_smoothing = 0.1
    unused_training_settings = frozenset({"random_order"})
    fills_hidden_codes = True

    @classmethod
    def check_sample_settings(cls, settings: SampleSettings) -> None:
        """Check that the decoding order exists.

        Raises:
            BadRequestError: No order has this name.
        """
        if settings.order not in ORDERS:
            raise BadRequestError(f"unknown sample.order {settings.order!r}", f"Known orders: {', '.join(ORDERS)}.")

    def forward(self, codes: Tensor, classes: Tensor | None = None) -> Tensor:
        """Return the logits of every code given the visible ones; see CodePrior.forward."""
        x = self.tokens(codes.flatten(1, 2))
        if classes is not None:
            x = torch.cat([x, self.class_tokens(classes)], dim=1)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.logits(x[:, : self.shape.positions]).view(*codes.shape, self.shape.codebook_size)

    def targets(self, images: int, generator: torch.Generator, schedule: MaskSchedule = "cosine") -> Tensor:
        """Draw the codes that a training step masks and predicts, [B, h, w, c] bool; see CodePrior.targets."""
        return training_mask((images, *self.shape.size), generator, schedule)

    def inputs(self, codes: Tensor, targets: Tensor) -> Tensor:
        """Return codes [B, h, w, c] with the targets masked."""
        return codes.masked_fill(targets, self.unknown)

    def manifest_entries(self, settings: SampleSettings) -> dict[str, Any]:
        """Return the number of codes that each step decides."""
        return {"revealed": revealed(self.shape.codes, settings.steps, settings.mask_schedule)}

    def validation_metrics(self, loss: float, loss_by_target_share: Sequence[float]) -> Mapping[str, Any]:
        """Return the loss by the share of masked codes, from the lowest share to the highest."""
        return {"loss_by_masked_share": list(loss_by_target_share)}

    @torch.inference_mode()
    def decode(
        self,
        seeds: Sequence[int],
        classes: Tensor | None,
        settings: SampleSettings,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw the codes of images by parallel decoding; see CodePrior.decode.

        Every step draws all unknown codes and keeps those with the highest scores in the order of the settings.
        """
        self.check_sample_settings(settings)
        score = ORDERS[settings.order]
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
            scores = score(log_probability, uniforms[:, step, 1], step, settings, self.shape)
            masked = (codes == self.unknown).flatten(1)
            scores = scores.masked_fill(~masked, math.inf)  # A known code is never masked again.
            rank = scores.argsort(1).argsort(1)
            hidden = rank < masked_after(step, steps, start, masked.sum(1, keepdim=True), settings.mask_schedule)
            decided = torch.where(masked, drawn, codes.flatten(1))
            codes = decided.masked_fill(hidden, self.unknown).view(size)
        return codes

    def _guided_logits(self, codes: Tensor, classes: Tensor | None, settings: SampleSettings, step: int) -> Tensor:
        # A step without guidance does not need the images without their class.
        strength = settings.guidance_at(step, settings.steps)
        rows = draws.guided_rows(len(codes), classes, strength)
        with reproducible_attention():
            logits = self(draws.repeat_guided(codes, rows), draws.guided_classes(classes, self.no_class, strength))
        return draws.guide(logits, len(codes), strength)

    def _first_logits(self, images: int, classes: Tensor | None, settings: SampleSettings) -> Tensor:
        """Return the logits of images without known codes, computed once for each class: a class has one result."""
        if classes is None:
            distinct, index = None, torch.zeros(images, dtype=torch.int64, device=self.position.device)
        else:
            distinct, index = classes.unique(return_inverse=True)
        count = 1 if distinct is None else len(distinct)
        unknown = torch.full((count, *self.shape.size), self.unknown, device=self.position.device)
        return self._guided_logits(unknown, distinct, settings, 0)[index]


_SCHEDULES: dict[MaskSchedule, Callable[[Any, Any], Any]] = {
    "cosine": lambda progress, module: module.cos(progress * (math.pi / 2)),
    "arccos": lambda progress, module: module.acos(progress) / (math.pi / 2),
    "linear": lambda progress, module: 1 - progress,
    "square": lambda progress, module: 1 - progress * progress,
}
"""The mask schedules as functions of the progress, a tensor or a number, and of the module with its functions: cosine,
linear and square of MaskGIT, and the arccos of MaskBit (Weber et al. 2024)."""


def mask_ratio(progress: Tensor, schedule: MaskSchedule = "cosine") -> Tensor:
    """Return the share of codes, in [0, 1], that are masked at a progress in [0, 1]: from 1 at 0 to 0 at 1."""
    ratio: Tensor = _SCHEDULES[schedule](progress, torch)
    return ratio


def training_mask(shape: Sequence[int], generator: torch.Generator, schedule: MaskSchedule = "cosine") -> Tensor:
    """Draw the mask of a training step: each image has its own ratio, and each code is masked independently.

    Args:
        shape: Shape of the mask, [B, h, w, c].
        generator: Generator on the device of the mask.
        schedule: Schedule whose ratio at a progress drawn from [0, 1) each image has.

    Returns:
        [B, h, w, c] bool, True = masked.
    """
    progress = torch.rand(shape[0], 1, 1, 1, generator=generator, device=generator.device)
    ratio = mask_ratio(progress, schedule)
    return torch.rand(*shape, generator=generator, device=generator.device) < ratio


def ratio_mask(ratio: float, seeds: Sequence[int], shape: CodeShape) -> Tensor:
    """Return masks for reconstructing images from a few of their codes (appendix A), equally many in each channel.

    Args:
        ratio: Share of the positions whose code is hidden in each channel, in [0, 1]; 0.95 of 256 leaves 12 visible.
        seeds: Seeds of the B images. With the same seed, a larger ratio hides all codes that a smaller one hides.
        shape: Shape of the codes.

    Returns:
        [B, h, w, c] bool on the CPU, True = hidden.
    """
    visible = math.floor(shape.positions * (1 - ratio) + _ROUNDING)
    order = draws.image_uniforms(seeds, (shape.positions, shape.chunks)).argsort(1).argsort(1)
    return (order >= visible).view(len(seeds), *shape.size)


def code_losses(logits: Tensor, codes: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of every code, masked or not, in nats, [B, h, w, c], at least in float32.

    Args:
        logits: Logits, [B, h, w, c, K].
        codes: True codes, [B, h, w, c] int64.
        label_smoothing: Share of the target spread evenly over all K codes.
    """
    flat = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(flat, codes.flatten(), reduction="none", label_smoothing=label_smoothing).view(codes.shape)


def masked_loss(
    logits: Tensor, codes: Tensor, mask: Tensor, label_smoothing: float, count: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of the masked codes, in nats a code, float32.

    Args:
        logits: Logits, [B, h, w, c, K].
        codes: True codes, [B, h, w, c] int64.
        mask: Masked codes, [B, h, w, c] bool.
        label_smoothing: Share of the target spread evenly over all K codes.
        count: Scalar by which the sum is divided; None is the number of masked codes.

    Returns:
        Scalar; 0 if no code is masked.
    """
    # A weighted sum has static shapes; selecting the masked codes would make the host wait for the device.
    weight = mask.float()
    loss = code_losses(logits, codes, label_smoothing) * weight
    return loss.sum() / (weight.sum() if count is None else count).clamp(min=1)


def masked_after(step: int, steps: int, start: Tensor, now: Tensor, schedule: MaskSchedule = "cosine") -> Tensor:
    """Return how many codes stay masked after a decoding step.

    Args:
        step: Index of the step, t in [0, T).
        steps: Number of steps, T.
        start: Number of codes of each image that were unknown at the start, N0, int64 of any shape.
        now: Number of codes that are unknown before this step, of the same shape.
        schedule: Schedule of the share of codes that stay masked.

    Returns:
        floor(N0 mask_ratio((t + 1) / T)) as int64, but at least 1 and at most one less than `now`, so that every step
        decides a code as long as there are enough codes; 0 after the last step.
    """
    if step == steps - 1:
        return torch.zeros_like(start)
    share: float = _SCHEDULES[schedule]((step + 1) / steps, math)
    masked = (start.double() * share + _ROUNDING).floor().long()
    return masked.minimum(now - 1).clamp(min=1).minimum(now)


def revealed(codes: int, steps: int, schedule: MaskSchedule = "cosine") -> list[int]:
    """Return how many codes of an image each decoding step decides if no code is known at the start."""
    start = torch.tensor(codes)
    left = [start]
    for step in range(steps):
        left.append(masked_after(step, steps, start, left[-1], schedule))
    return [int(before - after) for before, after in pairwise(left)]
