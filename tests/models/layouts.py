"""Layouts of the tokenizer that several tests build."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from movq_cli.models.quantizers.vector import VectorQuantizer
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import ModulationSettings, TokenizerSettings

MOVQ = TokenizerSettings()
VQGAN = TokenizerSettings(chunks=1, initial_feature="quantized", modulation=None)
KANDINSKY = TokenizerSettings(
    channels=128,
    multipliers=(1, 2, 2, 4),
    attention_resolutions=(32,),
    z_channels=4,
    embed_dim=4,
    chunks=1,
    codebook_size=16_384,
    initial_feature="quantized",
    modulation=ModulationSettings(levels=4, source="quantized", affine=True),
)
MIDDLE = TokenizerSettings(
    initial_feature="projected", modulation=ModulationSettings(levels=0, kernel_size=3, source="quantized")
)
TINY = TokenizerSettings(
    resolution=16,
    channels=32,
    multipliers=(1, 2),
    blocks=1,
    attention_resolutions=(8,),
    z_channels=12,
    embed_dim=32,
    chunks=4,
    codebook_size=50,
    modulation=ModulationSettings(levels=1),
)


@cache
def on_meta(chosen: TokenizerSettings) -> Tokenizer:
    """Return a tokenizer without memory for its weights."""
    with torch.device("meta"):
        return Tokenizer(chosen)


@cache
def tiny(initial_feature: str = "fourier") -> Tokenizer:
    """Return a small tokenizer in eval mode, with random weights in every norm, map and codebook entry."""
    torch.manual_seed(0)
    model = Tokenizer(TokenizerSettings(**{**dict(TINY), "initial_feature": initial_feature})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "conv_y" in name or "conv_b" in name:
            nn.init.normal_(parameter, std=0.1)
    assert isinstance(model.quantize, VectorQuantizer)
    nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def random_images(batch: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(batch, 3, height, width) * 2 - 1
