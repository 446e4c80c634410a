"""The random numbers of sampling: one generator an image, inverse CDF, Gumbel.

An image's numbers come from its own seed, on the CPU, in one order: image i is the same whatever the batch size,
the device, the number of processes, or where a killed run went on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from movq_cli.settings import SampleSettings

_SMALLEST = 2.0**-25
"""Half the spacing of torch.rand's float32 values: keeps the logarithm of a drawn 0 finite."""


def image_uniforms(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1) for each image.

    Args:
        seeds: One seed an image, each in [0, 2^32): torch's CPU generator reads no more bits.
        shape: Of the numbers of one image.

    Returns:
        [len(seeds), *shape] float32 on the CPU.
    """
    return torch.stack([torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draw_codes(logits: Tensor, uniforms: Tensor, settings: SampleSettings) -> tuple[Tensor, Tensor]:
    """Draw each code from its distribution by the inverse of the cumulative distribution.

    One uniform number a code, where torch.multinomial would take K of them, or a state that depends on the batch.

    Args:
        logits: [..., K] of any float type.
        uniforms: [...] float32 in [0, 1).
        settings: Temperature, which divides the logits, and truncation, which follows it.

    Returns:
        The codes [...] int64 and the natural logarithm of their probabilities [...] float32.
    """
    probability = distribution(logits, settings)
    codes = inverse_cdf(probability, uniforms)
    return codes, probability.gather(-1, codes.unsqueeze(-1)).squeeze(-1).log()


def distribution(logits: Tensor, settings: SampleSettings) -> Tensor:
    """The probabilities that codes are drawn with, float32 of the logits' shape; see draw_codes."""
    scaled = logits if settings.temperature == 1 else logits.float() / settings.temperature
    return truncated(scaled.softmax(-1, dtype=torch.float32), settings)


def inverse_cdf(probability: Tensor, uniforms: Tensor) -> Tensor:
    """The codes [...] at which the sum of the probabilities [..., K] passes uniform numbers [...] in [0, 1)."""
    cumulative = probability.cumsum(-1)
    # Scaled by the sum, which rounding leaves a little off 1; `right` so that a code of probability 0 is never drawn.
    target = uniforms.unsqueeze(-1) * cumulative[..., -1:]
    codes = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return codes.clamp(max=probability.shape[-1] - 1)


def truncated(probability: Tensor, settings: SampleSettings) -> Tensor:
    """A distribution's likeliest codes alone: the first top_k of them, and of these as many as make up top_p.

    Args:
        probability: [..., K], adding up to 1.
        settings: top_k and top_p (Holtzman et al. 2020).

    Returns:
        The same shape, adding up to 1 again; 0 for codes that are left out.
    """
    if settings.top_k is None and settings.top_p == 1:
        return probability
    ordered, places = probability.sort(stable=True, dim=-1, descending=True)
    ranks = torch.arange(ordered.shape[-1], device=ordered.device)
    share = ordered
    if settings.top_k is not None:
        share = share.masked_fill(ranks >= settings.top_k, 0)
        share = share / share.sum(-1, keepdim=True)
    # A code is left out where those before it make up top_p already: the likeliest one never is.
    left_out = (share.cumsum(-1) - share >= settings.top_p) | (share == 0) & (ranks > 0)
    kept = probability.masked_fill(torch.zeros_like(left_out).scatter(-1, places, left_out), 0)
    return kept / kept.sum(-1, keepdim=True)


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1), the same shape."""
    return -(-uniforms.clamp(min=_SMALLEST).log()).log()


# --- classifier-free guidance (Ho & Salimans 2022) --------------------------------------------------------------------


def guided_rows(images: int, classes: Tensor | None, settings: SampleSettings) -> int:
    """Rows of the batch that a model is passed: twice the images where each is also seen without its class."""
    return 2 * images if classes is not None and settings.guidance > 0 else images


def guided_classes(classes: Tensor | None, unknown: int, settings: SampleSettings) -> Tensor | None:
    """The classes of those rows, of classes [B]: the images' own, and then none."""
    if classes is None or settings.guidance == 0:
        return classes
    return torch.cat([classes, torch.full_like(classes, unknown)])


def repeat_guided(x: Tensor, rows: int) -> Tensor:
    """What is shown of images [B, ...] in as many rows."""
    return x if len(x) == rows else torch.cat([x, x])


def guide(logits: Tensor, images: int, strength: float | Tensor) -> Tensor:
    """Logits moved away from those without a class: conditional + strength (conditional - unconditional).

    Args:
        logits: [B or 2 B, ...], as the rows are.
        images: B.
        strength: 0 = the conditional ones.
    """
    if len(logits) == images:
        return logits
    conditional, unconditional = logits.float().chunk(2)
    return conditional + strength * (conditional - unconditional)


def draw_guided(logits: Tensor, uniforms: Tensor, settings: SampleSettings, strength: Tensor) -> Tensor:
    """Draw codes [B] from logits [B or 2 B, K], guided with a strength, [1]."""
    return inverse_cdf(distribution(guide(logits, len(uniforms), strength), settings), uniforms)
