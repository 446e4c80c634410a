"""The losses of stage 1 as pure functions (equation 3, and VQGAN's perceptual and adversarial terms)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.training_settings import TrainVQSettings

_SMALLEST_NORM = 1e-4


class ReconstructionLoss(NamedTuple):
    """The terms of the reconstruction loss; each is a scalar, the mean over the batch."""

    total: Tensor
    """The weighted sum of the terms, which VQGAN's code calls "nll"."""
    l1: Tensor
    l2: Tensor
    perceptual: Tensor


def reconstruction(
    images: Tensor, originals: Tensor, settings: TrainVQSettings, perceptual: nn.Module | None
) -> ReconstructionLoss:
    """Return the first term of equation 3, in VQGAN's form.

    Args:
        images: Reconstructions, [B, 3, H, W] float32, nominally in [-1, 1].
        originals: Original images, of the same shape, in [-1, 1].
        settings: Weights of the terms.
        perceptual: LPIPS network, from two tensors [B, 3, H, W] to [B, 1, 1, 1]; with None that term is 0.
    """
    l1 = F.l1_loss(images, originals)
    l2 = F.mse_loss(images, originals)
    distance = images.new_zeros(()) if perceptual is None else perceptual(images, originals).mean()
    total = settings.l1_weight * l1 + settings.l2_weight * l2 + settings.perceptual_weight * distance
    return ReconstructionLoss(total, l1, l2, distance)


def quantizer(terms: Mapping[str, Tensor], settings: TrainVQSettings) -> Tensor:
    """Return the weighted sum of a quantizer's losses.

    Args:
        terms: Scalar losses by name, at least one.
        settings: Weights; that of a loss NAME is the setting NAME_weight.
    """
    return torch.stack([getattr(settings, f"{name}_weight") * term for name, term in terms.items()]).sum()


def entropy_temperature(settings: TrainVQSettings) -> float | None:
    """Return the temperature of the entropy loss; None if the loss is not computed."""
    return settings.entropy_temperature if settings.entropy_weight > 0 else None


def logged(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the losses of a quantizer that belong in the log.

    The commitment loss differs from the codebook loss in its gradient alone, so that beside it its value is left out.
    """
    return {name: term for name, term in terms.items() if name != "commitment" or "codebook" not in terms}


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss of the discriminator from logits of any shape; 0 if all real > 1 and all fake < -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """Return the adversarial loss of the decoder: minus the mean logit of its images."""
    return -fake.mean()


def lecam(real: Tensor, fake: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """Return the LeCam regularization of the discriminator, E[(D(x) - a_F)_+^2] + E[(a_R - D(G(z)))_+^2].

    It limits by how much the logits of images exceed the average of those of reconstructions, and the reverse (Tseng et
    al. 2021, "Regularizing generative adversarial networks under limited data"). The paper's equation has the squares
    without the positive part (..)_+, which the authors' code has.

    Args:
        real: Logits of images, of any shape.
        fake: Logits of reconstructions, of any shape.
        real_average: Average of the logits of images over the steps before, a_R, a scalar.
        fake_average: The same of reconstructions, a_F.
    """
    return F.relu(real - fake_average).square().mean() + F.relu(real_average - fake).square().mean()


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Return the mean squared norm of the gradient of a logit at the images, E[|grad D(x)|^2].

    Half of it, times gamma, is R1 of Mescheder et al. 2018, "Which training methods for GANs do actually converge?",
    equation 9. As in the hinge loss, each patch of an image is a sample. Its gradient is not computed alone, but the
    squared norm of the sum of all gradients, over the number of logits: both are equal if the patches do not overlap.

    Args:
        logits: Logits of the images, [B, 1, H', W'].
        images: Images, [B, 3, H, W], which require a gradient.

    Returns:
        Scalar, whose gradient goes to the weights of the discriminator.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum() / logits.numel()


def adaptive_weight(
    features: Tensor,
    last: nn.Conv2d,
    image_gradient: Tensor,
    adversarial_gradient: Tensor,
    limit: float,
    ranks: Ranks = SINGLE_PROCESS,
) -> Tensor:
    """Return VQGAN's weight of the adversarial term: the ratio of both losses' gradient norms at the last layer.

    The gradients at the layer are computed from those at the images, which avoids another pass through the decoder and
    the losses.

    Args:
        features: Input of the last layer, [B, C, H, W].
        last: Last convolution of the decoder.
        image_gradient: Gradient of the reconstruction loss with respect to the images, [B, 3, H, W].
        adversarial_gradient: Gradient of the adversarial loss with respect to the images, [B, 3, H, W].
        limit: Largest weight. VQGAN's code has 1e4; without a low one, the weight rises while the discriminator fails.
        ranks: Processes whose gradients are averaged first, as the gradients of the last layer will be.

    Returns:
        Scalar float32 in [0, limit], detached.
    """
    with torch.autocast(features.device.type, enabled=False), torch.no_grad():
        # Both gradients come from one convolution with twice the output channels, which reads the features once.
        both = torch.cat([image_gradient, adversarial_gradient], dim=1)
        shape = (2 * last.out_channels, *last.weight.shape[1:])
        gradients = ranks.mean(conv2d_weight(features.detach().float(), shape, both, padding=last.padding))
        image, adversarial = gradients.unflatten(0, (2, -1)).flatten(1).norm(dim=1)
        return (image / (adversarial + _SMALLEST_NORM)).clamp(0, limit)
