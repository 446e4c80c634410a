"""The random numbers of sampling: one generator an image, inverse CDF, Gumbel.

An image's numbers come from its own seed, on the CPU, in one order: image i is the same whatever the batch size,
the device, the number of processes, or where a killed run went on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def draw_codes(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw each code from its distribution by the inverse of the cumulative distribution.

    One uniform number a code, where torch.multinomial would take K of them, or a state that depends on the batch.

    Args:
        logits: [..., K] of any float type.
        uniforms: [...] float32 in [0, 1).
        temperature: Divides the logits; 1 = as learned.

    Returns:
        The codes [...] int64 and the natural logarithm of their probabilities [...] float32.
    """
    log_probability = (logits.float() / temperature).log_softmax(-1)
    cumulative = log_probability.exp().cumsum(-1)
    # Scaled by the sum, which rounding leaves a little off 1; `right` so that a code of probability 0 is never drawn.
    target = uniforms.unsqueeze(-1) * cumulative[..., -1:]
    codes = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return codes.squeeze(-1), log_probability.gather(-1, codes).squeeze(-1)


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1), the same shape."""
    return -(-uniforms.clamp(min=_SMALLEST).log()).log()
