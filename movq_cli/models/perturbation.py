"""Latent perturbation: codes replaced by near ones, as a prior's errors replace them.

The source is Qiu et al. 2025 ("Robust latent matters: boosting image generation with sampling error synthesis", section
3.2, and "Image tokenizer needs post-training"): in a share of the images of a batch (beta), a share of the codes
(alpha) becomes one of the entries that are nearest to the code's own entry (delta of them, itself included).
Shapes: B batch, h w code grid, c chunks, N = h w c codes of an image, K codes, d width of a code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from movq_cli.models.quantizer import Quantizer

_MAX_DISTANCES = 2**24
"""Largest number of distances in memory at one time: 64 MiB."""


class Perturbation(NamedTuple):
    """How codes are perturbed."""

    images: float
    """Share of the images that are perturbed, in [0, 1]; beta in the source."""
    codes: float
    """Share of the codes of such an image that are replaced, in [0, 1]; alpha in the source."""
    neighbors: int
    """Number of nearest entries from which the new code is drawn; delta in the source."""


def entries_of(quantizer: Quantizer, codebook_size: int, device: torch.device) -> Tensor:
    """Return the vector of each code of a quantizer on a device, [K, d] float32, without a gradient."""
    codes = torch.arange(codebook_size, device=device)
    with torch.no_grad():
        return quantizer.decode(codes.view(-1, 1, 1, 1)).flatten(1)


@torch.no_grad()
def perturb(
    codes: Tensor, entries: Tensor, perturbation: Perturbation, generator: torch.Generator | None = None
) -> Tensor:
    """Replace codes by near ones.

    Each of the c codes of a position is replaced independently of the others: the share is one of N codes.

    Args:
        codes: Codes, [B, h, w, c] int64 in [0, K).
        entries: Vectors of all codes, [K, d].
        perturbation: Shares of images and of codes, and number of neighbors.
        generator: Generator on the device of the codes; None uses the default one.

    Returns:
        [B, h, w, c] int64. The number of perturbed images, and of replaced codes in each of them, is the share of all
        rounded down; a replaced code may get its own value again, since its own entry is the nearest one.
    """
    flat = codes.flatten(1)
    images, count = flat.shape
    draws = torch.rand(images, 1 + count, generator=generator, device=codes.device)
    chosen_images = draws[:, :1].argsort(0).argsort(0) < int(perturbation.images * images + 1e-9)
    chosen = (draws[:, 1:].argsort(1).argsort(1) < int(perturbation.codes * count + 1e-9)) & chosen_images
    neighbors = min(perturbation.neighbors, len(entries))
    rank = torch.randint(neighbors, flat.shape, generator=generator, device=codes.device)
    replaced = flat.clone()
    replaced[chosen] = _neighbors(flat[chosen], entries, rank[chosen], neighbors)
    return replaced.view(codes.shape)


def _neighbors(codes: Tensor, entries: Tensor, rank: Tensor, count: int) -> Tensor:
    """Return for each of n codes [n] the code whose entry has a rank [n] in [0, count) by the distance to its own."""
    squares = entries.square().sum(1)
    found = []
    size = max(1, _MAX_DISTANCES // len(entries))
    for block, ranks in zip(codes.split(size), rank.split(size), strict=True):
        distances = torch.addmm(squares, entries[block], entries.t(), alpha=-2)
        distances.scatter_(1, block[:, None], -torch.inf)  # Rounding must not put another entry before the code's own.
        nearest = distances.topk(count, largest=False).indices
        found.append(nearest.gather(1, ranks[:, None]).squeeze(1))
    return torch.cat(found) if found else codes
