"""The gradient estimators of a vector quantizer: how gradients pass from a chosen entry to the encoder's output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

_SMALLEST_NORM = 1e-6

Estimator = Callable[[Tensor, Tensor], Tensor]
"""A gradient estimator.

Args:
    z: Vectors of the encoder, [..., d].
    vectors: The entry that was chosen for each, of the same shape.

Returns:
    The entries up to rounding, whose gradient goes to `z` alone.
"""


def straight_through(z: Tensor, vectors: Tensor) -> Tensor:
    """Copy the gradient at the entry to the vector of the encoder (van den Oord et al. 2017, section 3.2)."""
    return z + (vectors - z).detach()


def rotate(z: Tensor, vectors: Tensor) -> Tensor:
    """Rotate and scale each vector of the encoder to its entry, by a matrix that has no gradient.

    This is the rotation trick (Fifty et al. 2024, "Restructuring vector quantization with the rotation trick",
    section 4.2): q = lambda R z, with lambda = |q| / |z|, R = I - 2 r r^T + 2 q^ z^^T, and r the unit vector along the
    sum of the unit vectors z^ and q^. The angle between the gradient and the entry is that between the gradient at z
    and z.
    """
    fixed, entry = z.detach(), vectors.detach()
    scale = entry.norm(dim=-1, keepdim=True) / fixed.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM)
    direction, target = normalize(fixed, dim=-1), normalize(entry, dim=-1)
    middle = normalize(direction + target, dim=-1)
    reflected = middle * (z * middle).sum(-1, keepdim=True)
    turned = target * (z * direction).sum(-1, keepdim=True)
    return scale * (z - 2 * reflected + 2 * turned)


ESTIMATORS: dict[str, Estimator] = {"straight-through": straight_through, "rotation": rotate}
"""The estimators by the name that the setting `train_vq.quantizer_gradient` gives them."""


def entropy_loss(rows: Tensor, entries: Tensor, temperature: float) -> Tensor:
    """Return the entropy loss on distances, E[H(p(z))] - H(E[p(z)]), in nats.

    The first term makes each choice certain, the second one makes all entries equally frequent: the entropy penalty of
    MAGVIT-v2 (Yu et al. 2024, "Language model beats diffusion: tokenizer is key to visual generation", section 3.1). A
    choice is the softmax of the negative squared distances over the temperature, as in the code of MaskGIT (Chang et
    al. 2022). The expectation is over the vectors of one forward pass of one process, of all chunks together.

    Args:
        rows: Vectors of the encoder, [..., d] float32.
        entries: Codebook, [K, d].
        temperature: Temperature of the softmax; MaskGIT's is 0.01.

    Returns:
        Scalar in [-ln K, 0], whose gradient goes to the vectors and to the entries.
    """
    # The term |z|^2 of the distance is the same for all entries, so that the softmax does not depend on it.
    affinity = 2 * rows.flatten(0, -2) @ entries.t() - entries.square().sum(1)
    log_probability = (affinity / temperature).log_softmax(-1)
    probability = log_probability.exp()
    certainty = -(probability * log_probability).sum(-1).mean()
    return certainty - torch.special.entr(probability.mean(0)).sum()
