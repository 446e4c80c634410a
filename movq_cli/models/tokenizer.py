"""Stage 1: images to multichannel codes and back (equations 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from movq_cli.models import quantizers
from movq_cli.models.autoencoder import Decoder, Encoder
from movq_cli.settings import TokenizerSettings


class Reconstruction(NamedTuple):
    """The outputs of a forward pass that a training step needs."""

    images: Tensor
    """[B, 3, H, W] float32, nominally in [-1, 1]."""
    features: Tensor
    """[B, widths[0], H, W]: the input of the last convolution."""
    encoded: Tensor
    """[B, D, h, w]: the input of the quantizer."""
    codes: Tensor
    """[B, h, w, c] int64."""
    losses: Mapping[str, Tensor]
    """The quantizer's scalar losses by name; see Quantized."""


class Tokenizer(nn.Module):
    """The first stage of MoVQ; with one chunk and no modulation in the settings it is VQGAN's.

    Args:
        settings: Settings of the architecture; weight files store them, so that the model can be rebuilt.
    """

    def __init__(self, settings: TokenizerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings)
        self.decoder = Decoder(settings)
        self.quantize = quantizers.build(settings)
        self.quant_conv = nn.Conv2d(settings.z_channels, settings.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(settings.embed_dim, settings.z_channels, 1)
        if self.decoder.conv_in is None:
            # Its output is not used in this case. It exists for its name in weight files and its parameter count.
            self.post_quant_conv.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.quant_conv.weight.device

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode, quantize and decode images [B, 3, H, W] in [-1, 1]."""
        encoded = self.quant_conv(self.encoder(images))
        vectors, codes, losses = self.quantize(encoded)
        features = self.decoder.features(self.post_quant_conv(vectors), vectors)
        return Reconstruction(self.decoder.to_images(features).float(), features, encoded, codes, losses)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes of images.

        Args:
            images: [B, 3, H, W] float in [-1, 1]; H and W are multiples of the downsampling factor.

        Returns:
            [B, h, w, c] int64 in [0, K).
        """
        return self.quantize.encode(self.quant_conv(self.encoder(images)))

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the images of codes.

        Args:
            codes: [B, h, w, c] int64 in [0, K).

        Returns:
            [B, 3, H, W] float32, clamped to [-1, 1].
        """
        vectors = self.quantize.decode(codes)
        return self.decoder(self.post_quant_conv(vectors), vectors).float().clamp(-1, 1)
