"""Encoder and decoder compute, layer by layer, what plain formulas give."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from movq_cli.models.autoencoder import AttentionBlock, Downsample, ResidualBlock, Upsample
from movq_cli.models.modulation import Norm, SpatialNorm
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import ModulationSettings, TokenizerSettings
from tests.models.layouts import MIDDLE, TINY, random_images

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Weights = dict[str, Tensor]
PLAIN = partial(Norm, groups=32)
MODULATED = partial(SpatialNorm, condition_channels=5, groups=32, settings=ModulationSettings())


def ready(module: ModuleT) -> tuple[ModuleT, Weights]:
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module, {name: parameter.detach() for name, parameter in module.named_parameters()}


def plain_norm(weights: Weights, name: str, x: Tensor, condition: Tensor | None) -> Tensor:
    """GroupNorm of 32 groups, modulated where the weights have maps for it."""
    prefix = f"{name}.norm_layer" if f"{name}.conv_y.weight" in weights else name
    out = F.group_norm(x, 32, weights.get(f"{prefix}.weight"), weights.get(f"{prefix}.bias"), eps=1e-6)
    if prefix == name:
        return out
    assert condition is not None
    wide = F.interpolate(condition, size=x.shape[-2:])
    return out * plain_conv(weights, f"{name}.conv_y", wide) + plain_conv(weights, f"{name}.conv_b", wide)


def plain_conv(weights: Weights, name: str, x: Tensor) -> Tensor:
    kernel = weights[f"{name}.weight"]
    return F.conv2d(x, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)


def plain_block(weights: Weights, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
    h = plain_norm(weights, f"{name}norm1", x, condition)
    h = plain_conv(weights, f"{name}conv1", h * torch.sigmoid(h))
    h = plain_norm(weights, f"{name}norm2", h, condition)
    h = plain_conv(weights, f"{name}conv2", h * torch.sigmoid(h))
    return h + (plain_conv(weights, f"{name}nin_shortcut", x) if f"{name}nin_shortcut.weight" in weights else x)


def plain_attention(weights: Weights, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
    h = plain_norm(weights, f"{name}norm", x, condition)
    q, k, v = (plain_conv(weights, f"{name}{part}", h).flatten(2) for part in "qkv")
    weight = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(-1)
    out = torch.einsum("bij,bcj->bci", weight, v).view(x.shape)
    return x + plain_conv(weights, f"{name}proj_out", out)


def plain_down(weights: Weights, name: str, x: Tensor) -> Tensor:
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1, dtype=x.dtype)
    padded[:, :, :-1, :-1] = x
    kernel = weights[f"{name}weight"]
    out = weights[f"{name}bias"][None, :, None, None].repeat(len(x), 1, x.shape[2] // 2, x.shape[3] // 2)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            out[:, :, i, j] += torch.einsum("bchw,ochw->bo", padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel)
    return out


def plain_up(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.conv2d(
        x.repeat_interleave(2, 2).repeat_interleave(2, 3), weights[f"{name}weight"], weights[f"{name}bias"], padding=1
    )


def plain_level(weights: Weights, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
    for block in range(8):
        if f"{name}.block.{block}.conv1.weight" in weights:
            x = plain_block(weights, f"{name}.block.{block}.", x, condition)
        if f"{name}.attn.{block}.q.weight" in weights:
            x = plain_attention(weights, f"{name}.attn.{block}.", x, condition)
    return x


def plain_middle(weights: Weights, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
    x = plain_block(weights, f"{name}.block_1.", x, condition)
    x = plain_attention(weights, f"{name}.attn_1.", x, condition)
    return plain_block(weights, f"{name}.block_2.", x, condition)


def plain_encoder(weights: Weights, levels: int, images: Tensor) -> Tensor:
    h = plain_conv(weights, "encoder.conv_in", images)
    for level in range(levels):
        h = plain_level(weights, f"encoder.down.{level}", h)
        if level < levels - 1:
            h = plain_down(weights, f"encoder.down.{level}.downsample.conv.", h)
    h = plain_norm(weights, "encoder.norm_out", plain_middle(weights, "encoder.mid", h), None)
    return plain_conv(weights, "encoder.conv_out", h * torch.sigmoid(h))


def plain_decoder(weights: Weights, levels: int, quantized: Tensor, *, fourier: bool, raw: bool) -> Tensor:
    first = None
    if "decoder.conv_in.weight" in weights:
        first = plain_conv(weights, "decoder.conv_in", plain_conv(weights, "post_quant_conv", quantized))
    angle = 2 * torch.pi * quantized
    h, condition = torch.cat([angle.sin(), angle.cos()], 1) if fourier else first, quantized if raw else first
    if "decoder.initial_feature.projection.weight" in weights:
        h = plain_conv(weights, "decoder.initial_feature.projection", quantized).sin()
    assert h is not None
    h = plain_middle(weights, "decoder.mid", h, condition)
    for level in reversed(range(levels)):
        h = plain_level(weights, f"decoder.up.{level}", h, condition)
        if level > 0:
            h = plain_up(weights, f"decoder.up.{level}.upsample.conv.", h)
    h = plain_norm(weights, "decoder.norm_out", h, condition)
    return plain_conv(weights, "decoder.conv_out", h * torch.sigmoid(h))


@pytest.mark.parametrize("widths", [(64, 64), (32, 64), (64, 32)])
@pytest.mark.parametrize("modulated", [False, True])
def test_a_residual_block_is_its_formula(widths: tuple[int, int], modulated: bool) -> None:
    torch.manual_seed(0)
    make_norm = MODULATED if modulated else PLAIN
    block, weights = ready(ResidualBlock(*widths, make_norm))
    x, condition = torch.randn(2, widths[0], 6, 4).double(), torch.randn(2, 5, 3, 2).double()
    assert ("nin_shortcut.weight" in weights) == (widths[0] != widths[1])
    torch.testing.assert_close(block(x, condition), plain_block(weights, "", x, condition), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("modulated", [False, True])
def test_attention_is_its_formula_with_an_explicit_softmax(modulated: bool) -> None:
    torch.manual_seed(0)
    make_norm = MODULATED if modulated else PLAIN
    block, weights = ready(AttentionBlock(64, make_norm))
    x, condition = torch.randn(2, 64, 6, 4).double(), torch.randn(2, 5, 3, 2).double()
    torch.testing.assert_close(block(x, condition), plain_attention(weights, "", x, condition), atol=1e-10, rtol=1e-10)


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 2), height=st.integers(1, 4), width=st.integers(1, 4))
def test_downsampling_pads_right_and_below_and_upsampling_repeats(batch: int, height: int, width: int) -> None:
    down, down_weights = ready(Downsample(3).conv)
    up, up_weights = ready(Upsample(3).conv)
    outer_down, outer_up = Downsample(3), Upsample(3)
    outer_down.conv, outer_up.conv = down, up
    x = torch.randn(batch, 3, 2 * height, 2 * width).double()
    torch.testing.assert_close(outer_down(x), plain_down(down_weights, "", x), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(outer_up(x), plain_up(up_weights, "", x), atol=1e-11, rtol=1e-11)


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 2), height=st.integers(1, 4), width=st.integers(1, 4), seed=st.integers(0, 100))
def test_the_shortcut_of_upsampling_has_the_gradients_of_its_two_steps(
    batch: int, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    up = Upsample(6).double()
    x = torch.randn(batch, 6, height, width, dtype=torch.float64, requires_grad=True)
    downstream = torch.randn(batch, 6, 2 * height, 2 * width, dtype=torch.float64)
    assert up.conv.bias is not None
    learned = (x, up.conv.weight, up.conv.bias)
    plain = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    for ours, theirs in zip(
        torch.autograd.grad(up(x), learned, downstream), torch.autograd.grad(plain, learned, downstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


REFERENCES: dict[str, dict[str, object]] = {
    "movq": dict(TINY),
    "vqgan": {**dict(TINY), "chunks": 1, "initial_feature": "quantized", "modulation": None},
    "kandinsky": {
        **dict(TINY),
        "multipliers": (1, 2, 3),
        "attention_resolutions": (8, 4),
        "embed_dim": 4,
        "chunks": 1,
        "initial_feature": "quantized",
        "modulation": ModulationSettings(levels=3, source="quantized", affine=True),
    },
    "middle": {**dict(TINY), "initial_feature": "projected", "modulation": MIDDLE.modulation},
    "wide maps": {**dict(TINY), "blocks": 2, "modulation": ModulationSettings(levels=2, kernel_size=3)},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", REFERENCES)
def test_encoder_and_decoder_are_their_formulas_layer_by_layer(layout: str, seed: int) -> None:
    """In float64: with some weights, these networks amplify the rounding of float32 to a relative error of 4e-4."""
    torch.manual_seed(seed)
    chosen = TokenizerSettings.model_validate(REFERENCES[layout])
    model = Tokenizer(chosen).double()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "conv_y" in name or "conv_b" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    levels, images = len(chosen.multipliers), random_images(2, 16, 8).double()
    quantized = 0.3 * torch.randn(2, chosen.embed_dim, 4, 3).double()
    with torch.no_grad():
        encoded = model.encoder(images)
        decoded = model.decoder(model.post_quant_conv(quantized), quantized)
    expected = plain_encoder(weights, levels, images)
    torch.testing.assert_close(encoded, expected, atol=1e-10 * expected.abs().max().item(), rtol=0)
    fourier = chosen.initial_feature == "fourier"
    raw = chosen.modulation is not None and chosen.modulation.source == "quantized"
    expected = plain_decoder(weights, levels, quantized, fourier=fourier, raw=raw)
    torch.testing.assert_close(decoded, expected, atol=1e-10 * expected.abs().max().item(), rtol=0)


def test_attention_learns_everywhere_but_in_the_bias_of_the_keys() -> None:
    torch.manual_seed(0)
    block, _ = ready(AttentionBlock(64, PLAIN))
    (block(torch.randn(2, 64, 3, 4).double()) * torch.randn(2, 64, 3, 4).double()).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        size = parameter.grad.abs().max()
        assert size < 1e-11 if name == "k.bias" else size > 1e-3, name
