"""VQGAN's encoder and decoder (Esser et al. 2021), the decoder modulated where the settings say.

Parameter names are those of the CompVis lineage, so that published weights load as they are.
Shapes: B batch, H W image side, h w code grid (H / factor), D quantized channels.
"""

from __future__ import annotations

from collections.abc import Callable

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
from movq_cli.settings import ModulationSettings, TokenizerSettings

MakeNorm = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """Norm, SiLU and a 3x3 convolution, twice, beside a shortcut (1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, in, H, W] to [B, out, H, W]; the condition goes to the norms."""
        h = self.conv1(F.silu(self.norm1(x, condition)))
        h = self.conv2(F.silu(self.norm2(h, condition)))
        return h + self.nin_shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, beside a shortcut."""

    def __init__(self, channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm = make_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, C, H, W] to the same shape; the condition goes to the norm."""
        h = self.norm(x, condition)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Half the side by a stride-2 convolution, padded right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H / 2, W / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, 2 H, 2 W]."""
        if x.is_cuda:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # The two in one, with 4/9 of the arithmetic: of the nine taps those that fall on copies of one pixel are added
        # up first, which makes a transposed convolution of stride 2. Measured on CPUs alone, so CUDA goes without.
        weight = self.conv.weight
        added = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        taps = F.linear(weight.flatten(2), torch.kron(added, added)).unflatten(2, (4, 4))
        return F.conv_transpose2d(x, taps.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """The residual blocks that work at one resolution, each with an attention after it where asked.

    Args:
        before: Channels that come in.
        width: Channels that go out.
        blocks: Residual blocks.
        attention: Whether each block is followed by self-attention.
        make_norm: Makes the norm of a given width.
    """

    def __init__(self, before: int, width: int, blocks: int, *, attention: bool, make_norm: MakeNorm) -> None:
        super().__init__()
        inputs = [before] + [width] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(channels, width, make_norm) for channels in inputs)
        self.attn = nn.ModuleList(AttentionBlock(width, make_norm) for _ in inputs if attention)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, before, H, W] to [B, width, H, W]."""
        for index, block in enumerate(self.block):
            x = block(x, condition)
            if self.attn:
                x = self.attn[index](x, condition)
        return x


class DownLevel(Level):
    """A level of the encoder and its step to the next coarser one (none after the coarsest)."""

    def __init__(self, before: int, width: int, blocks: int, *, attention: bool, last: bool) -> None:
        super().__init__(before, width, blocks, attention=attention, make_norm=Norm)
        self.downsample = nn.Identity() if last else Downsample(width)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, before, H, W] to [B, width, H / 2, W / 2], or H, W at the last level."""
        return self.downsample(super().forward(x, condition))


class UpLevel(Level):
    """A level of the decoder and its step to the next finer one (none after the finest)."""

    def __init__(
        self, before: int, width: int, blocks: int, *, attention: bool, make_norm: MakeNorm, last: bool
    ) -> None:
        super().__init__(before, width, blocks, attention=attention, make_norm=make_norm)
        self.upsample = nn.Identity() if last else Upsample(width)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, before, H, W] to [B, width, 2 H, 2 W], or H, W at the last level."""
        return self.upsample(super().forward(x, condition))


class Middle(nn.Module):
    """Two residual blocks around one attention, at the coarsest resolution."""

    def __init__(self, channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, make_norm)
        self.attn_1 = AttentionBlock(channels, make_norm)
        self.block_2 = ResidualBlock(channels, channels, make_norm)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, C, h, w] to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x, condition), condition), condition)


class Encoder(nn.Module):
    """Images to continuous features at the code grid's resolution."""

    def __init__(self, settings: TokenizerSettings) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, settings.channels, 3, padding=1)
        self.down = nn.ModuleList()
        before = settings.channels
        for index, width in enumerate(settings.widths):
            attention = settings.resolution // 2**index in settings.attention_resolutions
            last = index == len(settings.widths) - 1
            self.down.append(DownLevel(before, width, settings.blocks, attention=attention, last=last))
            before = width
        self.mid = Middle(before, Norm)
        self.norm_out = Norm(before)
        self.conv_out = nn.Conv2d(before, settings.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [-1, 1] to [B, z_channels, h, w]."""
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Quantized maps to images: section 3.1's modulated decoder, or VQGAN's where nothing is modulated."""

    def __init__(self, settings: TokenizerSettings) -> None:
        super().__init__()
        widths = settings.widths
        before = widths[-1]
        self.initial_feature = _initial_feature(settings)
        self.condition_on_quantized = settings.modulation is not None and settings.modulation.source == "quantized"
        # Absent where nothing reads it: F0 then comes from elsewhere, and the norms from the quantized map itself.
        reads_conv_in = self.initial_feature is None or not self.condition_on_quantized
        self.conv_in = nn.Conv2d(settings.z_channels, before, 3, padding=1) if reads_conv_in else None
        self.mid = Middle(before, _norm_maker(settings, level=-1))
        levels: list[UpLevel] = []
        for depth, width in enumerate(reversed(widths)):  # depth 0 is the coarsest
            index = len(widths) - 1 - depth
            attention = settings.resolution // 2**index in settings.attention_resolutions
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
        # Named up.0 for the finest, as in every published weight, though the coarsest runs first.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm_maker(settings, level=len(widths) - 1)(before)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def features(self, z: Tensor, quantized: Tensor) -> Tensor:
        """Everything before the last convolution, whose input the adaptive weight needs.

        Args:
            z: [B, z_channels, h, w], the projected quantized map.
            quantized: [B, D, h, w], the codebook vectors themselves.

        Returns:
            [B, widths[0], H, W].
        """
        first = None if self.conv_in is None else self.conv_in(z)
        h = first if self.initial_feature is None else self.initial_feature(quantized)
        condition = quantized if self.condition_on_quantized else first
        h = self.mid(h, condition)
        for level in reversed(self.up):
            h = level(h, condition)
        return F.silu(self.norm_out(h, condition))

    def forward(self, z: Tensor, quantized: Tensor) -> Tensor:
        """Map the two to images [B, 3, H, W], nominally in [-1, 1]."""
        return self.conv_out(self.features(z, quantized))


def _initial_feature(settings: TokenizerSettings) -> nn.Module | None:
    width = settings.widths[-1]
    match settings.initial_feature:
        case "quantized":
            return None  # conv_in(z_q), the way of VQGAN
        case "fourier":
            return FourierFeature()
        case "projected":
            return ProjectedFeature(settings.embed_dim, width)
        case "sinusoid":
            return SinusoidFeature(width)
        case "constant":
            return ConstantFeature(width, settings.grid)


def _norm_maker(settings: TokenizerSettings, level: int) -> MakeNorm:
    """The norm of one decoder level, counted from the coarsest; -1 is the middle."""
    modulation = settings.modulation
    if modulation is None or level >= modulation.levels:
        return Norm
    channels = settings.widths[-1] if modulation.source == "conv_in" else settings.embed_dim
    return _modulated(channels, modulation)


def _modulated(condition_channels: int, modulation: ModulationSettings) -> MakeNorm:
    return lambda channels: SpatialNorm(channels, condition_channels, modulation)
