"""Stage 1's losses as pure functions (equation 3, and VQGAN's perceptual and adversarial terms)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.settings import TrainVQSettings

_LARGEST_WEIGHT = 1e4
_SMALLEST_NORM = 1e-4


class ReconstructionLoss(NamedTuple):
    """How far images are from their originals; each term a scalar mean over the batch."""

    total: Tensor
    """The weighted sum, VQGAN's "nll"."""
    l1: Tensor
    l2: Tensor
    perceptual: Tensor


def reconstruction(
    images: Tensor, originals: Tensor, settings: TrainVQSettings, perceptual: nn.Module | None
) -> ReconstructionLoss:
    """The first term of equation 3, as VQGAN reads it.

    Args:
        images: [B, 3, H, W] float32, nominally in [-1, 1].
        originals: The same shape, in [-1, 1].
        settings: The terms' weights.
        perceptual: LPIPS, [B, 3, H, W] twice to [B, 1, 1, 1]; None = that term is 0.
    """
    l1 = F.l1_loss(images, originals)
    l2 = F.mse_loss(images, originals)
    distance = images.new_zeros(()) if perceptual is None else perceptual(images, originals).mean()
    total = settings.l1_weight * l1 + settings.l2_weight * l2 + settings.perceptual_weight * distance
    return ReconstructionLoss(total, l1, l2, distance)


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss of logits of any shape; 0 once real > 1 and fake < -1 everywhere."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """What the decoder lowers: minus the mean logit of its images."""
    return -fake.mean()


def adaptive_weight(
    features: Tensor,
    last: nn.Conv2d,
    image_gradient: Tensor,
    adversarial_gradient: Tensor,
    ranks: Ranks = SINGLE_PROCESS,
) -> Tensor:
    """VQGAN's weight of the adversarial term: the ratio of the two losses' gradients at the last layer.

    Both gradients are derived from the ones at the images, so that neither the decoder nor the losses are passed
    through a second time.

    Args:
        features: [B, C, H, W], the last layer's input.
        last: The decoder's last convolution.
        image_gradient: [B, 3, H, W], of the reconstruction loss with respect to the images.
        adversarial_gradient: The same of the adversarial loss.
        ranks: Whose gradients are averaged first, as those of the last layer will be.

    Returns:
        Scalar float32 in [0, 1e4], detached.
    """
    with torch.autocast(features.device.type, enabled=False), torch.no_grad():
        # As the gradient of one layer with the outputs of two: the features are gone through once.
        both = torch.cat([image_gradient, adversarial_gradient], dim=1)
        shape = (2 * last.out_channels, *last.weight.shape[1:])
        gradients = ranks.mean(conv2d_weight(features.detach().float(), shape, both, padding=last.padding))
        image, adversarial = gradients.unflatten(0, (2, -1)).flatten(1).norm(dim=1)
        return (image / (adversarial + _SMALLEST_NORM)).clamp(0, _LARGEST_WEIGHT)
