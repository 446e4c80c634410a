"""Random draws of sampling: uniform numbers by seed, codes by the inverse CDF, Gumbel noise, and guidance.

The random numbers of an image come from a CPU generator with the image's own seed, always in the same order. They do
not depend on the batch size, the device, the number of processes, or the point at which a run was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from movq_cli.settings import SampleSettings

_SMALLEST = 2.0**-25
"""Half the spacing of the float32 values of torch.rand; it replaces a 0, whose logarithm is not finite."""


def image_uniforms(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return uniform random numbers in [0, 1) for each image.

    Args:
        seeds: Seed of each image, in [0, 2^32), since torch's CPU generator reads no more bits.
        shape: Shape of the numbers of one image.

    Returns:
        [len(seeds), *shape] float32 on the CPU.
    """
    return torch.stack([torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draw_codes(logits: Tensor, uniforms: Tensor, settings: SampleSettings) -> tuple[Tensor, Tensor]:
    """Draw each code from its distribution by the inverse of the cumulative distribution.

    This needs one uniform number for each code. torch.multinomial needs K of them, or a generator state that depends on
    the batch.

    Args:
        logits: Logits, [..., K] of any float type.
        uniforms: Uniform numbers, [...] float32 in [0, 1).
        settings: Settings with the temperature, which divides the logits, and the truncation, which comes after it.

    Returns:
        The codes, [...] int64, and the natural logarithms of their probabilities, [...] float32.
    """
    probability = distribution(logits, settings)
    codes = inverse_cdf(probability, uniforms)
    return codes, probability.gather(-1, codes.unsqueeze(-1)).squeeze(-1).log()


def distribution(logits: Tensor, settings: SampleSettings) -> Tensor:
    """Return the probabilities with which codes are drawn, float32 in the shape of the logits; see draw_codes."""
    scaled = logits if settings.temperature == 1 else logits.float() / settings.temperature
    return truncated(scaled.softmax(-1, dtype=torch.float32), settings)


def inverse_cdf(probability: Tensor, uniforms: Tensor) -> Tensor:
    """Return the codes [...] at which the cumulative probabilities [..., K] exceed uniform numbers [...] in [0, 1)."""
    cumulative = probability.cumsum(-1)
    # Rounding makes the sum differ slightly from 1, so that the numbers are scaled by it. With `right`, a code of
    # probability 0 is never drawn.
    target = uniforms.unsqueeze(-1) * cumulative[..., -1:]
    codes = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return codes.clamp(max=probability.shape[-1] - 1)


def truncated(probability: Tensor, settings: SampleSettings) -> Tensor:
    """Truncate distributions to the top_k most likely codes, and of these to the smallest set that reaches top_p.

    Args:
        probability: Probabilities, [..., K], which sum to 1.
        settings: Settings with top_k and top_p (nucleus sampling, Holtzman et al. 2020).

    Returns:
        Probabilities of the same shape, normalized to sum to 1; 0 for the removed codes.
    """
    if settings.top_k is None and settings.top_p == 1:
        return probability
    ordered, indices = probability.sort(stable=True, dim=-1, descending=True)
    ranks = torch.arange(ordered.shape[-1], device=ordered.device)
    share = ordered
    if settings.top_k is not None:
        share = share.masked_fill(ranks >= settings.top_k, 0)
        share = share / share.sum(-1, keepdim=True)
    # A code is removed if the more likely codes reach top_p without it. The most likely code is never removed.
    is_removed = (share.cumsum(-1) - share >= settings.top_p) | (share == 0) & (ranks > 0)
    remaining = probability.masked_fill(torch.zeros_like(is_removed).scatter(-1, indices, is_removed), 0)
    return remaining / remaining.sum(-1, keepdim=True)


def gumbel(uniforms: Tensor) -> Tensor:
    """Transform uniform numbers in [0, 1) to standard Gumbel noise of the same shape."""
    return -(-uniforms.clamp(min=_SMALLEST).log()).log()


# --- classifier-free guidance (Ho & Salimans 2022) --------------------------------------------------------------------


def guided_rows(images: int, classes: Tensor | None, strength: float) -> int:
    """Return the batch size of the model: with guidance, each image is in the batch with and without its class."""
    return 2 * images if classes is not None and strength > 0 else images


def guided_classes(classes: Tensor | None, no_class: int, strength: float) -> Tensor | None:
    """Return the class ids of the model's batch: the images' own, [B], then with guidance no class, [B]."""
    if classes is None or strength == 0:
        return classes
    return torch.cat([classes, torch.full_like(classes, no_class)])


def repeat_guided(x: Tensor, rows: int) -> Tensor:
    """Return images [B, ...] as a batch of `rows` for the model, which is B or, with guidance, 2 B."""
    return x if len(x) == rows else torch.cat([x, x])


def guide(logits: Tensor, images: int, strength: float | Tensor) -> Tensor:
    """Return the guided logits, [B, ...]: conditional + strength (conditional - unconditional).

    Args:
        logits: Logits of the model's batch, [B, ...] without guidance, else [2 B, ...].
        images: Number of images, B.
        strength: Strength of guidance; 0 gives the conditional logits.
    """
    if len(logits) == images:
        return logits
    conditional, unconditional = logits.float().chunk(2)
    return conditional + strength * (conditional - unconditional)


def draw_guided(logits: Tensor, uniforms: Tensor, settings: SampleSettings, strength: Tensor) -> Tensor:
    """Draw codes [B] from logits [B or 2 B, K] with a strength of guidance, [1]."""
    return inverse_cdf(distribution(guide(logits, len(uniforms), strength), settings), uniforms)
