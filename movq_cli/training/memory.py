"""What a training step will hold in memory, counted on tensors that have shapes and no storage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from movq_cli import devices
from movq_cli.models import priors
from movq_cli.models.autoencoder import AttentionBlock, ResidualBlock
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.models.transformer import Block
from movq_cli.settings import CodeShape, PriorSettings, TokenizerSettings, TrainSettings, TrainVQSettings
from movq_cli.training.loop import recompute

_FLOAT32 = 4
_LPIPS_LAYERS = 30
"""Of VGG-16's features: LPIPS looks no deeper."""

Memory = dict[str, float]
"""GiB by purpose, and their "total"."""


def of_tokenizer(vq: TokenizerSettings, train: TrainVQSettings, device: torch.device, ranks: int) -> Memory:
    """The memory of a step of stage 1 on each rank, before compilation, which saves some of it.

    Args:
        vq: The architecture.
        train: Batch, precision, average, discriminator, perceptual loss, checkpointing.
        device: Where it will run.
        ranks: That share the batch.
    """
    with FakeTensorMode(), torch.device(device):
        images = torch.empty(_images(train, ranks), 3, vq.resolution, vq.resolution)
        model = Tokenizer(vq)
        if train.activation_checkpointing:
            recompute(model, (ResidualBlock, AttentionBlock))
        judge = PatchDiscriminator(train.discriminator_channels, train.discriminator_layers)
        moving: list[nn.Module] = [model, judge] if train.adversarial_weight > 0 else [model]
        with devices.autocast(device, train.precision):
            kept = _kept(lambda: model(images), model)
            # The graphs of the two judges are built and given up one after the other, beside the tokenizer's.
            judged = [_kept(lambda: (judge(images), judge(images)), judge)] if train.adversarial_weight > 0 else []
        if train.perceptual_weight > 0:
            judged.append(_perceptual(images))
    return _account(moving, train, kept + max(judged, default=0), averaged=[model])


def of_prior(prior: PriorSettings, shape: CodeShape, train: TrainSettings, device: torch.device, ranks: int) -> Memory:
    """The memory of a step of stage 2 on each rank, before compilation, which saves some of it.

    Args:
        prior: The architecture.
        shape: Of the codes.
        train: Batch, precision, average, checkpointing.
        device: Where it will run.
        ranks: That share the batch.
    """
    with FakeTensorMode(), torch.device(device):
        images = _images(train, ranks)
        codes = torch.zeros(images, shape.height, shape.width, shape.chunks, dtype=torch.int64)
        classes = torch.zeros(images, dtype=torch.int64) if prior.classes else None
        model = priors.build(prior, shape)
        if train.activation_checkpointing:
            recompute(model, (Block,))
        with devices.autocast(device, train.precision), devices.attention(device, model.length):
            kept = _kept(
                lambda: nn.functional.cross_entropy(
                    model(codes, classes).flatten(0, -2).float(), codes.flatten(), reduction="none"
                ),
                model,
            )
    return _account([model], train, kept, averaged=[model])


def _images(train: TrainSettings, ranks: int) -> int:
    return max(1, train.batch_size // ranks // train.accumulate)


def _perceptual(images: Tensor) -> int:
    from torchvision.models import vgg16

    trunk = vgg16(weights=None, init_weights=False).features[:_LPIPS_LAYERS].requires_grad_(False)
    both = torch.cat([images, images]).requires_grad_()
    return _kept(lambda: trunk(both), trunk)


def _kept(forward: Callable[[], object], model: nn.Module) -> int:
    """Bytes that a pass keeps for the one backward, the model's own weights left out."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage's address is its own only as long as it lives

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(sizes.values())


def _account(moving: list[nn.Module], train: TrainSettings, activations: int, *, averaged: list[nn.Module]) -> Memory:
    weights = _FLOAT32 * sum(parameter.numel() for model in moving for parameter in model.parameters())
    average = _FLOAT32 * sum(parameter.numel() for model in averaged for parameter in model.parameters())
    sizes = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "average": average if train.ema_decay > 0 else 0,
        "activations": activations,
    }
    return {name: round(size / 2**30, 2) for name, size in (sizes | {"total": sum(sizes.values())}).items()}
