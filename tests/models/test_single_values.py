"""Norms whose groups have a single value, as those of an image that is as small as one code."""

from __future__ import annotations

import pytest
import torch

from movq_cli.models.modulation import Norm
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import TokenizerSettings


@pytest.mark.parametrize("batch", [1, 3])
def test_an_image_of_one_code_is_encoded_and_decoded(batch: int) -> None:
    settings = TokenizerSettings.model_validate(
        {
            **{"resolution": 16, "channels": 32, "multipliers": [1, 1], "blocks": 1, "attention_resolutions": []},
            **{"z_channels": 16, "embed_dim": 16, "codebook_size": 16, "modulation": {"levels": 1}},
        }
    )
    model = Tokenizer(settings).eval()
    codes = model.encode(torch.zeros(batch, 3, 2, 2))
    assert codes.shape[:3] == (batch, 1, 1)
    assert model.decode(codes).isfinite().all()


def test_the_only_value_of_a_group_becomes_the_bias_and_training_refuses_it() -> None:
    norm = Norm(4, 4).eval()
    torch.nn.init.uniform_(norm.bias)
    torch.testing.assert_close(norm(torch.randn(1, 4, 1, 1)).flatten(), norm.bias, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="more than 1 value"):
        norm.train()(torch.randn(1, 4, 1, 1))


def test_evaluating_gives_what_training_gives() -> None:
    norm, x = Norm(8, 4), torch.randn(2, 8, 3, 5)
    torch.nn.init.normal_(norm.weight)
    assert torch.equal(norm.train()(x), norm.eval()(x))
