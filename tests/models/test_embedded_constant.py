"""The other reading of Figure 6a's learned constant: it has the size of the quantized map, and goes through conv_in."""

from __future__ import annotations

import pytest
import torch

from movq_cli import presets
from movq_cli.models.tokenizer import Tokenizer


@pytest.mark.parametrize("source", ["conv_in", "quantized"])
def test_the_constant_has_the_channels_of_the_quantized_map(source: str) -> None:
    overrides = ["vq.initial_feature=embedded_constant", f"vq.modulation.source={source}"]
    with torch.device("meta"):
        tokenizer = Tokenizer(presets.load("constant-ffhq", overrides).vq)
        first = tokenizer.decoder(torch.empty(2, 256, 16, 16), torch.empty(2, 256, 16, 16))
    sizes = {name: tuple(value.shape) for name, value in tokenizer.named_parameters()}
    assert sizes["decoder.initial_feature.constant"] == (1, 256, 16, 16)
    assert "decoder.conv_in.weight" in sizes
    assert first.shape == (2, 3, 256, 256)
    total = sum(value.numel() for value in tokenizer.parameters())
    assert source != "conv_in" or total == 82_824_067 - 256 * 16 * 16  # 256 channels less than constant-ffhq


def test_a_gradient_reaches_the_constant_and_the_codes() -> None:
    small = ["resolution=32", "channels=32", "multipliers=[1,2]", "z_channels=32", "embed_dim=32", "blocks=1"]
    small += ["initial_feature=embedded_constant", "attention_resolutions=[]", "modulation.levels=2"]
    overrides = [f"vq.{setting}" for setting in small]
    tokenizer = Tokenizer(presets.load("ffhq", overrides).vq)
    images, _ = tokenizer(torch.randn(2, 3, 32, 32))[:2]
    torch.nn.functional.mse_loss(images, torch.randn(2, 3, 32, 32)).backward()
    parameters = dict(tokenizer.named_parameters())
    for name in ("initial_feature.constant", "mid.block_1.norm1.conv_y.weight"):
        gradient = parameters[f"decoder.{name}"].grad
        assert gradient is not None and gradient.abs().sum() > 0
