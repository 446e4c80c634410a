"""The cost of a training step in memory and arithmetic, counted on fake tensors, which have no storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

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
from movq_cli.settings import CodeShape, PriorSettings, TokenizerSettings
from movq_cli.training import losses
from movq_cli.training.trainable import checkpoint_activations, is_compiled
from movq_cli.training_settings import TrainSettings, TrainVQSettings

_FLOAT32_BYTES = 4
_LPIPS_LAYERS = 30
"""Number of layers of VGG-16 that LPIPS uses."""

# The arithmetic of a step in forward passes over one batch. A backward pass to the inputs and the weights counts as two
# forward passes, one to the inputs alone as one.
_TRAINING_PASSES = 3
_LPIPS_PASSES = 2 + 1  # Forward on reconstructions and originals, backward to the reconstructions.
_DISCRIMINATOR_PASSES = 2 + 2 * 3  # Generator loss: forward, backward to its images. Then training on two batches.


_FEW_LAYERS = 3
"""Number of layers of the prior that is counted. With mode=depth, two of them work over the chunks."""

_TRANSIENT = 0.3
"""Transient memory over that of the activations: the largest ratio that was measured on the CPU."""

_TRANSIENT_ON_CUDA = 0.1
"""The same for the tokenizer on CUDA; the ratio of preset ffhq on an H200 is 0.04 (docs/measured.md)."""

_COMPILED_ACTIVATIONS = 0.55
"""Activations of the compiled tokenizer over those of the uncompiled one; for ffhq, with the transient memory of both,
the ratio is 0.54."""


class Cost(NamedTuple):
    """Cost of one step on one rank."""

    memory: dict[str, float]
    """Memory in GiB by purpose, and its "total". "transient" is what a step holds beside the tensors that it saves:
    gradients of activations in the backward pass, and the work space of convolutions."""
    flops: int
    """Floating-point operations of matrix products and convolutions, without what checkpointing computes again."""


class _ForwardPass(NamedTuple):
    """Cost of a forward pass of a model."""

    saved_bytes: int  # Tensors saved for the backward pass, without the model's weights.
    flops: int
    parameters: int  # Of the model.


def of_tokenizer(vq: TokenizerSettings, train: TrainVQSettings, device: torch.device, ranks: int) -> Cost:
    """Return the cost of a training step of stage 1.

    Args:
        vq: Settings of the tokenizer's architecture.
        train: Training settings.
        device: Device on which the training will run.
        ranks: Number of ranks that share each batch.
    """
    images = _images_per_pass(train, ranks)
    shape = (images, 3, *vq.image_size)
    quantizer = (train.quantizer_gradient, losses.entropy_temperature(train))
    own = _tokenizer_pass(vq, images, device, train.precision, train.activation_checkpointing, *quantizer)
    adversarial = perceptual = penalty = _ForwardPass(0, 0, 0)
    if train.adversarial_weight > 0:
        layout = tuple(train.discriminator_layout.items())
        adversarial = _discriminator_pass(layout, shape, device, train.precision)
        if train.r1_weight > 0:
            penalty = _penalty_pass(layout, shape, device)
    if train.perceptual_weight > 0:
        perceptual = _perceptual_pass(shape, device)
    # The graphs of the discriminator and of LPIPS exist one after the other, each beside the tokenizer's graph.
    # That of the penalty exists beside the discriminator's.
    others = max(2 * adversarial.saved_bytes + penalty.saved_bytes, 2 * perceptual.saved_bytes)
    saved_bytes = own.saved_bytes + others
    flops = _TRAINING_PASSES * own.flops + _DISCRIMINATOR_PASSES * adversarial.flops + _LPIPS_PASSES * perceptual.flops
    flops += _TRAINING_PASSES * penalty.flops // train.r1_every
    if is_compiled(train, train.steps, device):
        saved_bytes = int(_COMPILED_ACTIVATIONS * saved_bytes)
    transient = _TRANSIENT_ON_CUDA if device.type == "cuda" else _TRANSIENT
    memory = _memory(own.parameters + adversarial.parameters, own.parameters, train, saved_bytes, transient)
    return Cost(memory, train.accumulate * flops)


def of_prior(prior: PriorSettings, shape: CodeShape, train: TrainSettings, device: torch.device, ranks: int) -> Cost:
    """Return the cost of a training step of stage 2.

    Args:
        prior: Settings of the prior's architecture.
        shape: Shape of an image's codes.
        train: Training settings.
        device: Device on which the training will run.
        ranks: Number of ranks that share each batch.
    """
    layers = min(prior.layers, _FEW_LAYERS)
    arguments = (shape, _images_per_pass(train, ranks), device, train.precision, train.activation_checkpointing)
    few = _prior_pass(prior.model_copy(update={"layers": layers}), *arguments)
    more = few
    if prior.layers > layers:
        more = _prior_pass(prior.model_copy(update={"layers": layers + 1}), *arguments)
    # All further layers are equal, and counting each of them would take many seconds.
    own = _ForwardPass(
        *(first + (prior.layers - layers) * (next_ - first) for first, next_ in zip(few, more, strict=True))
    )
    memory = _memory(own.parameters, own.parameters, train, own.saved_bytes, _TRANSIENT)
    return Cost(memory, train.accumulate * _TRAINING_PASSES * own.flops)


def lpips_parameters() -> int:
    """Return the number of LPIPS's parameters: VGG-16's, and one weight for each channel of the compared layers.

    The layers that LPIPS compares are the last ones before each pooling layer, and the last one of all.
    """
    with torch.device("meta"):
        trunk = _lpips_trunk()
    compared_channels, width = 0, 0
    for layer in trunk:
        if isinstance(layer, nn.MaxPool2d):
            compared_channels += width
        elif isinstance(layer, nn.Conv2d):
            width = layer.out_channels
    return sum(parameter.numel() for parameter in trunk.parameters()) + compared_channels + width


def _images_per_pass(train: TrainSettings, ranks: int) -> int:
    return max(1, train.batch_size // ranks // train.accumulate)


# The passes are cached, because the search for settings that fit a memory or a time repeats them.


@cache
def _tokenizer_pass(
    vq: TokenizerSettings,
    images: int,
    device: torch.device,
    precision: str,
    with_checkpointing: bool,
    gradient: str,
    entropy_temperature: float | None,
) -> _ForwardPass:
    with FakeTensorMode(), torch.device(device), devices.WithoutInitialization():
        batch = torch.empty(images, 3, *vq.image_size)
        model = Tokenizer(vq)
        model.quantize.prepare_training(gradient, entropy_temperature)
        if with_checkpointing:
            checkpoint_activations(model, (ResidualBlock, AttentionBlock))
        with devices.autocast(device, precision):
            return _forward_pass(lambda: model(batch), model)


@cache
def _discriminator_pass(
    layout: tuple[tuple[str, Any], ...], shape: tuple[int, ...], device: torch.device, precision: str
) -> _ForwardPass:
    with FakeTensorMode(), torch.device(device), devices.WithoutInitialization():
        model = PatchDiscriminator(**dict(layout))
        batch = torch.empty(shape)
        with devices.autocast(device, precision):
            return _forward_pass(lambda: model(batch), model)


@cache
def _penalty_pass(layout: tuple[tuple[str, Any], ...], shape: tuple[int, ...], device: torch.device) -> _ForwardPass:
    """Return the cost of computing R1: the pass forward and the one back to the images, whose graph is saved."""
    with FakeTensorMode(), torch.device(device), devices.WithoutInitialization():
        model = PatchDiscriminator(**dict(layout))
        images = torch.empty(shape, requires_grad=True).view(shape)  # The counter of operations refuses a leaf here.
        return _forward_pass(lambda: losses.gradient_penalty(model(images), images), model)


@cache
def _perceptual_pass(shape: tuple[int, ...], device: torch.device) -> _ForwardPass:
    """Return the cost of one forward pass of LPIPS's trunk; a step runs it on reconstructions and on originals."""
    with FakeTensorMode(), torch.device(device), devices.WithoutInitialization():
        trunk = _lpips_trunk()
        batch = torch.empty(shape)
        return _forward_pass(lambda: trunk(batch.requires_grad_()), trunk)


@cache
def _prior_pass(
    prior: PriorSettings,
    shape: CodeShape,
    images: int,
    device: torch.device,
    precision: str,
    with_checkpointing: bool,
) -> _ForwardPass:
    with FakeTensorMode(), torch.device(device), devices.WithoutInitialization():
        codes = torch.zeros(images, *shape.size, dtype=torch.int64)
        classes = torch.zeros(images, dtype=torch.int64) if prior.classes else None
        model = priors.build(prior, shape)
        if with_checkpointing:
            checkpoint_activations(model, (Block,))

        def loss() -> Tensor:
            logits = model(codes, classes).flatten(0, -2).float()
            return nn.functional.cross_entropy(logits, codes.flatten(), reduction="none")

        with devices.autocast(device, precision), devices.attention_kernels(device, model.length):
            return _forward_pass(loss, model)


def _lpips_trunk() -> nn.Sequential:
    from torchvision.models import vgg16

    trunk: nn.Sequential = vgg16(weights=None, init_weights=False).features[:_LPIPS_LAYERS].requires_grad_(False)
    return trunk


def _forward_pass(forward: Callable[[], object], model: nn.Module) -> _ForwardPass:
    """Run a forward pass of a model and return its cost."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # The address of a storage identifies it only as long as it is alive.

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter,
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
    ):
        result = forward()
    del result
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return _ForwardPass(sum(sizes.values()), counter.get_total_flops(), parameters)


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
    """Return the operations of attention on queries, keys and values of these shapes [B, heads, N, W / heads]."""
    return sdpa_flop_count(q, k, v)


# PyTorch's counter knows only the attention kernels of CUDA.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def _memory(trained: int, averaged: int, train: TrainSettings, activations: int, transient: float) -> dict[str, float]:
    """Return the memory of training in GiB by purpose, and its total.

    Args:
        trained: Number of parameters of the models with an optimizer.
        averaged: Number of parameters of the model of which a running average may be kept.
        train: Training settings.
        activations: Bytes saved for the backward pass.
        transient: Transient memory over that of the activations.
    """
    weights = _FLOAT32_BYTES * trained
    sizes = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "average": _FLOAT32_BYTES * averaged if train.ema_decay > 0 else 0,
        "activations": activations,
        "transient": transient * activations,
    }
    return {name: round(size / 2**30, 2) for name, size in (sizes | {"total": sum(sizes.values())}).items()}
