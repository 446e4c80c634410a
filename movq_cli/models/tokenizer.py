"""Stage 1: images to multichannel codes and back (equations 1 and 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from movq_cli.models.autoencoder import Decoder, Encoder
from movq_cli.models.quantizer import VectorQuantizer
from movq_cli.settings import TokenizerSettings


class Reconstruction(NamedTuple):
    """What a training step needs of one pass through the tokenizer."""

    images: Tensor
    """[B, 3, H, W] float32, nominally in [-1, 1]."""
    features: Tensor
    """[B, widths[0], H, W]: the last convolution's input."""
    encoded: Tensor
    """[B, D, h, w]: the quantizer's input."""
    codes: Tensor
    """[B, h, w, c] int64."""
    codebook_loss: Tensor
    """Scalar: see Quantized."""
    commitment_loss: Tensor
    """Scalar: see Quantized."""


class Tokenizer(nn.Module):
    """MoVQ's first stage, or VQGAN's where the settings ask for one chunk and no modulation.

    Args:
        settings: The architecture; kept, since a weight file is rebuilt from it.
    """

    def __init__(self, settings: TokenizerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings)
        self.decoder = Decoder(settings)
        self.quantize = VectorQuantizer(settings.codebook_size, settings.code_dim)
        self.quant_conv = nn.Conv2d(settings.z_channels, settings.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(settings.embed_dim, settings.z_channels, 1)
        if self.decoder.conv_in is None:
            # Nothing reads it; it is there for its name and its count.
            self.post_quant_conv.requires_grad_(False)

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode, quantize and decode images [B, 3, H, W] in [-1, 1], with what training needs."""
        encoded = self.quant_conv(self.encoder(images))
        quantized = self.quantize(encoded)
        features = self.decoder.features(self.post_quant_conv(quantized.vectors), quantized.vectors)
        return Reconstruction(
            self.decoder.conv_out(features).float(),
            features,
            encoded,
            quantized.codes,
            quantized.codebook_loss,
            quantized.commitment_loss,
        )

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """The codes of images.

        Args:
            images: [B, 3, H, W] float in [-1, 1]; H and W multiples of the downsampling factor.

        Returns:
            [B, h, w, c] int64 in [0, K).
        """
        return self.quantize.encode(self.quant_conv(self.encoder(images)))

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """The images of codes.

        Args:
            codes: [B, h, w, c] int64 in [0, K).

        Returns:
            [B, 3, H, W] float32, clamped to [-1, 1].
        """
        vectors = self.quantize.decode(codes)
        return self.decoder(self.post_quant_conv(vectors), vectors).float().clamp(-1, 1)
