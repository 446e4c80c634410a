"""What a training step costs, in memory and arithmetic, counted on tensors that have shapes and no storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from movq_cli import devices
from movq_cli.models import priors
from movq_cli.models.autoencoder import AttentionBlock, ResidualBlock
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.models.transformer import Block
from movq_cli.settings import CodeShape, PriorSettings, TokenizerSettings, TrainSettings, TrainVQSettings
from movq_cli.training.trainable import checkpoint_activations

_FLOAT32 = 4
_LPIPS_LAYERS = 30
"""Of VGG-16's features: LPIPS looks no deeper."""

# Passes over one batch that a step is worth, a backward pass to inputs and weights counting as two forward ones.
_LEARNING = 3
_JUDGED_BY_LPIPS = 2 + 1  # images and originals, and back to the images
_JUDGED_BY_DISCRIMINATOR = 2 + 2 * 3  # back to the images; then learning from originals and images


class Cost(NamedTuple):
    """Of one step on one rank."""

    memory: dict[str, float]
    """GiB by purpose, and their "total"; before compilation, which saves some of the activations."""
    flops: int
    """Operations of matrix products and convolutions; what checkpointing computes again is not counted."""


class _Pass(NamedTuple):
    """A forward pass."""

    kept: int  # bytes for the backward pass, the model's own weights left out
    flops: int


def of_tokenizer(vq: TokenizerSettings, train: TrainVQSettings, device: torch.device, ranks: int) -> Cost:
    """The cost of a step of stage 1.

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
            checkpoint_activations(model, (ResidualBlock, AttentionBlock))
        judge = PatchDiscriminator(train.discriminator_channels, train.discriminator_layers)
        with devices.autocast(device, train.precision):
            own = _pass(lambda: model(images), model)
            judged = _pass(lambda: judge(images), judge) if train.adversarial_weight > 0 else _Pass(0, 0)
        perceived = _perceptual(images) if train.perceptual_weight > 0 else _Pass(0, 0)
    moving: list[nn.Module] = [model, judge] if train.adversarial_weight > 0 else [model]
    # The graphs of the two judges are built and given up one after the other, beside the tokenizer's.
    kept = own.kept + max(2 * judged.kept, 2 * perceived.kept)
    flops = _LEARNING * own.flops + _JUDGED_BY_DISCRIMINATOR * judged.flops + _JUDGED_BY_LPIPS * perceived.flops
    return Cost(_account(moving, train, kept, averaged=model), train.accumulate * flops)


def of_prior(prior: PriorSettings, shape: CodeShape, train: TrainSettings, device: torch.device, ranks: int) -> Cost:
    """The cost of a step of stage 2.

    Args:
        prior: The architecture.
        shape: Of the codes.
        train: Batch, precision, average, checkpointing.
        device: Where it will run.
        ranks: That share the batch.
    """
    with FakeTensorMode(), torch.device(device):
        images = _images(train, ranks)
        codes = torch.zeros(images, *shape.size, dtype=torch.int64)
        classes = torch.zeros(images, dtype=torch.int64) if prior.classes else None
        model = priors.build(prior, shape)
        if train.activation_checkpointing:
            checkpoint_activations(model, (Block,))

        def loss() -> Tensor:
            logits = model(codes, classes).flatten(0, -2).float()
            return nn.functional.cross_entropy(logits, codes.flatten(), reduction="none")

        with devices.autocast(device, train.precision), devices.attention_kernels(device, model.length):
            own = _pass(loss, model)
    return Cost(_account([model], train, own.kept, averaged=model), train.accumulate * _LEARNING * own.flops)


def lpips_parameters() -> int:
    """Parameters of LPIPS with VGG-16: its trunk, and a weight for each channel that is looked at before a pooling."""
    with torch.device("meta"):
        trunk = _lpips_trunk()
    looked_at, width = 0, 0
    for layer in trunk:
        if isinstance(layer, nn.MaxPool2d):
            looked_at += width
        elif isinstance(layer, nn.Conv2d):
            width = layer.out_channels
    return sum(parameter.numel() for parameter in trunk.parameters()) + looked_at + width


def _images(train: TrainSettings, ranks: int) -> int:
    return max(1, train.batch_size // ranks // train.accumulate)


def _perceptual(images: Tensor) -> _Pass:
    """LPIPS's trunk on a batch once; it is passed twice, for images and originals."""
    trunk = _lpips_trunk()
    return _pass(lambda: trunk(images.clone().requires_grad_()), trunk)


def _lpips_trunk() -> nn.Sequential:
    from torchvision.models import vgg16

    trunk: nn.Sequential = vgg16(weights=None, init_weights=False).features[:_LPIPS_LAYERS].requires_grad_(False)
    return trunk


def _pass(forward: Callable[[], object], model: nn.Module) -> _Pass:
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage's address is its own only as long as it lives

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        result = forward()
    del result
    return _Pass(sum(sizes.values()), counter.get_total_flops())


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
    """Operations of an attention of these shapes [B, heads, N, W / heads]."""
    return sdpa_flop_count(q, k, v)


# PyTorch counts CUDA's kernels alone.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def _account(
    moving: list[nn.Module], train: TrainSettings, activations: int, *, averaged: nn.Module
) -> dict[str, float]:
    weights = _FLOAT32 * sum(parameter.numel() for model in moving for parameter in model.parameters())
    average = _FLOAT32 * sum(parameter.numel() for parameter in averaged.parameters())
    sizes = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "average": average if train.ema_decay > 0 else 0,
        "activations": activations,
    }
    return {name: round(size / 2**30, 2) for name, size in (sizes | {"total": sum(sizes.values())}).items()}
