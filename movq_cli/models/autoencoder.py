"""VQGAN's encoder and decoder (Esser et al. 2021); the settings choose which norms of the decoder are modulated.

Parameters have the names of the CompVis implementations, so that published weights load without renaming.
Shapes: B batch, H W image size, h w code grid (h = H / factor), D quantized channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_cli.models.modulation import (
    ConstantFeature,
    FourierFeature,
    Norm,
    ProjectedFeature,
    SinusoidFeature,
    SpatialNorm,
)
from movq_cli.settings import TokenizerSettings

MakeNorm = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """Norm, SiLU and a 3x3 convolution, twice, with a shortcut (a 1x1 convolution if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, in, H, W] to [B, out, H, W]; the norms get the condition."""
        h = self.conv1(F.silu(self.norm1(x, condition)))
        h = self.conv2(F.silu(self.norm2(h, condition)))
        return h + self.nin_shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, with a shortcut."""

    def __init__(self, channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm = make_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, C, H, W] to the same shape; the norm gets the condition."""
        h = self.norm(x, condition)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width by a stride-2 convolution with padding on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H / 2, W / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest-neighbour upsampling, followed by a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, 2 H, 2 W]."""
        if x.is_cuda:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # Both steps as one transposed convolution of stride 2, with 4/9 of the arithmetic: taps of the kernel that fall
        # on the same input pixel are added first. This is measured on CPUs only, and not used on CUDA.
        weight = self.conv.weight
        sums = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        taps = F.linear(weight.flatten(2), torch.kron(sums, sums)).unflatten(2, (4, 4))
        return F.conv_transpose2d(x, taps.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by self-attention if `attention` is true.

    Args:
        in_channels: Number of input channels.
        width: Number of output channels.
        blocks: Number of residual blocks.
        attention: Whether each block is followed by self-attention.
        make_norm: Function that makes a norm for a number of channels.
    """

    def __init__(self, in_channels: int, width: int, blocks: int, *, attention: bool, make_norm: MakeNorm) -> None:
        super().__init__()
        inputs = [in_channels] + [width] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(channels, width, make_norm) for channels in inputs)
        self.attn = nn.ModuleList(AttentionBlock(width, make_norm) for _ in inputs if attention)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, in_channels, H, W] to [B, width, H, W]."""
        for index, block in enumerate(self.block):
            x = block(x, condition)
            if self.attn:
                x = self.attn[index](x, condition)
        return x


class DownLevel(Level):
    """A level of the encoder, followed by downsampling except at the coarsest level."""

    def __init__(
        self, in_channels: int, width: int, blocks: int, *, attention: bool, make_norm: MakeNorm, last: bool
    ) -> None:
        super().__init__(in_channels, width, blocks, attention=attention, make_norm=make_norm)
        self.downsample = nn.Identity() if last else Downsample(width)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, in_channels, H, W] to [B, width, H / 2, W / 2], or to [B, width, H, W] at the last level."""
        return self.downsample(super().forward(x, condition))


class UpLevel(Level):
    """A level of the decoder, followed by upsampling except at the finest level."""

    def __init__(
        self, in_channels: int, width: int, blocks: int, *, attention: bool, make_norm: MakeNorm, last: bool
    ) -> None:
        super().__init__(in_channels, width, blocks, attention=attention, make_norm=make_norm)
        self.upsample = nn.Identity() if last else Upsample(width)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, in_channels, H, W] to [B, width, 2 H, 2 W], or to [B, width, H, W] at the last level."""
        return self.upsample(super().forward(x, condition))


class Middle(nn.Module):
    """Two residual blocks at the coarsest resolution, with self-attention between them if `attention` is true."""

    def __init__(self, channels: int, make_norm: MakeNorm, *, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, make_norm)
        self.attn_1 = AttentionBlock(channels, make_norm) if attention else None
        self.block_2 = ResidualBlock(channels, channels, make_norm)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, C, h, w] to the same shape."""
        h = self.block_1(x, condition)
        if self.attn_1 is not None:
            h = self.attn_1(h, condition)
        return self.block_2(h, condition)


class Encoder(nn.Module):
    """The encoder: images to continuous features at the resolution of the code grid."""

    def __init__(self, settings: TokenizerSettings) -> None:
        super().__init__()
        self.is_unit_range = settings.image_range == "0,1"
        self.conv_in = nn.Conv2d(3, settings.channels, 3, padding=1)
        self.down = nn.ModuleList()
        make_norm = partial(Norm, groups=settings.norm_groups)
        before = settings.channels
        for index, width in enumerate(settings.widths):
            attention = index in settings.attention_levels
            last = index == len(settings.widths) - 1
            self.down.append(
                DownLevel(before, width, settings.blocks, attention=attention, make_norm=make_norm, last=last)
            )
            before = width
        self.mid = Middle(before, make_norm, attention=settings.mid_attention)
        self.norm_out = make_norm(before)
        self.conv_out = nn.Conv2d(before, settings.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [-1, 1] to [B, z_channels, h, w]."""
        h = self.conv_in((images + 1) / 2 if self.is_unit_range else images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """The decoder: quantized maps to images, as in section 3.1, or as in VQGAN without modulation."""

    def __init__(self, settings: TokenizerSettings) -> None:
        super().__init__()
        widths = settings.widths
        before = widths[-1]
        self.is_unit_range = settings.image_range == "0,1"
        self.initial_feature = _initial_feature(settings)
        self.condition_on_quantized = settings.modulation is not None and settings.modulation.source == "quantized"
        # conv_in does not exist if it is not used: F0 comes from another source, and the norms are conditioned on the
        # quantized map.
        self.embeds_initial_feature = settings.initial_feature == "embedded_constant"
        reads_conv_in = self.initial_feature is None or self.embeds_initial_feature or not self.condition_on_quantized
        self.conv_in = nn.Conv2d(settings.z_channels, before, 3, padding=1) if reads_conv_in else None
        self.mid = Middle(before, _norm_maker(settings, level=-1), attention=settings.mid_attention)
        levels: list[UpLevel] = []
        for depth, width in enumerate(reversed(widths)):  # depth 0 is the coarsest
            index = len(widths) - 1 - depth
            attention = index in settings.attention_levels
            make_norm = _norm_maker(settings, level=depth)
            levels.append(
                UpLevel(
                    before,
                    width,
                    settings.blocks + 1,
                    attention=attention,
                    make_norm=make_norm,
                    last=index == 0,
                )
            )
            before = width
        # The finest level is up.0, as in all published weights, although the coarsest level runs first.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm_maker(settings, level=len(widths) - 1)(before)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def features(self, z: Tensor, quantized: Tensor) -> Tensor:
        """Return the input of the last convolution, which the adaptive weight needs.

        Args:
            z: Projection of the quantized map, [B, z_channels, h, w].
            quantized: Quantized map, the vectors of the codes, [B, D, h, w].

        Returns:
            [B, widths[0], H, W].
        """
        first = None if self.conv_in is None else self.conv_in(z)
        h = first if self.initial_feature is None else self.initial_feature(quantized)
        if self.embeds_initial_feature:
            assert self.conv_in is not None
            h = self.conv_in(h)
        condition = quantized if self.condition_on_quantized else first
        h = self.mid(h, condition)
        for level in reversed(self.up):
            h = level(h, condition)
        return F.silu(self.norm_out(h, condition))

    def to_images(self, features: Tensor) -> Tensor:
        """Map the input of the last convolution, [B, widths[0], H, W], to images [B, 3, H, W], nominally in [-1, 1]."""
        images = self.conv_out(features)
        return 2 * images - 1 if self.is_unit_range else images

    def forward(self, z: Tensor, quantized: Tensor) -> Tensor:
        """Return the images [B, 3, H, W], nominally in [-1, 1]; see `features` for the arguments."""
        return self.to_images(self.features(z, quantized))


def _initial_feature(settings: TokenizerSettings) -> nn.Module | None:
    width = settings.widths[-1]
    match settings.initial_feature:
        case "quantized":
            return None  # F0 is conv_in(z_q), as in VQGAN.
        case "fourier":
            return FourierFeature()
        case "projected":
            return ProjectedFeature(settings.embed_dim, width)
        case "sinusoid":
            return SinusoidFeature(width)
        case "constant":
            return ConstantFeature(width, settings.code_shape.height, settings.code_shape.width)
        case "embedded_constant":
            return ConstantFeature(settings.z_channels, settings.code_shape.height, settings.code_shape.width)


def _norm_maker(settings: TokenizerSettings, level: int) -> MakeNorm:
    """Return the function that makes the norms of a decoder level; 0 is the coarsest, -1 the middle block."""
    modulation = settings.modulation
    if modulation is None or level >= modulation.levels:
        return partial(Norm, groups=settings.norm_groups)
    channels = settings.widths[-1] if modulation.source == "conv_in" else settings.embed_dim
    return partial(SpatialNorm, condition_channels=channels, groups=settings.norm_groups, settings=modulation)
