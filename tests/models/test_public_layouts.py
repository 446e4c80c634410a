"""The settings that public tokenizers need: another quantizer, unit length, unit range, no attention in the middle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from movq_cli.errors import BadRequestError
from movq_cli.models import quantizers
from movq_cli.models.quantizers.logit import LogitQuantizer
from movq_cli.models.quantizers.vector import VectorQuantizer
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import TokenizerSettings
from tests.models.layouts import TINY, random_images


def changed(**changes: object) -> TokenizerSettings:
    return TokenizerSettings.model_validate({**dict(TINY), **changes})


def features(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 3, 5, generator=torch.Generator().manual_seed(0))


def test_normalized_codes_do_not_depend_on_any_length() -> None:
    torch.manual_seed(0)
    plain = VectorQuantizer(20, 4, normalize=True)
    torch.nn.init.normal_(plain.embedding.weight)
    scaled = VectorQuantizer(20, 4, normalize=True)
    with torch.no_grad():
        scaled.embedding.weight.copy_(plain.embedding.weight * torch.rand(20, 1).add(0.1))
    z = features(12)
    assert torch.equal(plain.encode(z), scaled.encode(7 * z))
    torch.testing.assert_close(plain(z).vectors, scaled(7 * z).vectors)


def test_normalized_codes_are_the_most_similar_entries_and_decode_to_unit_length() -> None:
    torch.manual_seed(0)
    model = VectorQuantizer(20, 4, normalize=True)
    torch.nn.init.normal_(model.embedding.weight)
    z = features(12)
    chunks = z.permute(0, 2, 3, 1).unflatten(-1, (3, 4))
    similarity = F.cosine_similarity(chunks[..., None, :], model.embedding.weight, dim=-1)
    codes = model.encode(z)
    assert torch.equal(codes, similarity.argmax(-1))
    lengths = model.decode(codes).permute(0, 2, 3, 1).unflatten(-1, (3, 4)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    out = model(z)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.vectors, model.decode(codes))
    # The losses are those of vectors of unit length: 2 - 2 cos, over the four channels.
    torch.testing.assert_close(out.losses["codebook"], (2 - 2 * similarity.amax(-1)).mean() / 4)


def test_gradients_of_normalized_codes_reach_the_encoder_and_the_entries() -> None:
    model = VectorQuantizer(20, 4, normalize=True)
    z = features(12).requires_grad_()
    out = model(z)
    (out.vectors.square().sum() + out.vectors.sum() + sum(out.losses.values())).backward()
    assert z.grad is not None
    assert model.embedding.weight.grad is not None
    # A change of length changes nothing, so that the gradient has no share along the vector.
    along = (z.grad.unflatten(1, (3, 4)) * z.detach().unflatten(1, (3, 4))).sum(2)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-5, rtol=0)


def test_the_logit_quantizer_chooses_the_largest_logit_and_reads_its_entry() -> None:
    torch.manual_seed(0)
    model = LogitQuantizer(20, 6)
    z = features(6)
    codes = model.encode(z)
    assert torch.equal(codes[..., 0], model.proj(z).argmax(1))
    out = model(z)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.vectors, model.embed.weight[codes[..., 0]].permute(0, 3, 1, 2))
    assert torch.equal(model.decode(codes), model.embed.weight[codes[..., 0]].permute(0, 3, 1, 2))


def test_the_logit_quantizer_has_the_gradient_of_the_soft_choice_and_of_the_chosen_entries() -> None:
    torch.manual_seed(0)
    model = LogitQuantizer(20, 6)
    z, weight = features(6).requires_grad_(), torch.randn(2, 6, 3, 5)
    (model(z).vectors * weight).sum().backward()
    soft = torch.einsum("bkhw,kd->bdhw", model.proj(z).softmax(1), model.embed.weight.detach())
    (expected,) = torch.autograd.grad((soft * weight).sum(), z)
    torch.testing.assert_close(z.grad, expected)
    entries = torch.zeros_like(model.embed.weight).index_add_(
        0, model.encode(z.detach()).flatten(), weight.permute(0, 2, 3, 1).reshape(-1, 6)
    )
    torch.testing.assert_close(model.embed.weight.grad, entries)


@pytest.mark.parametrize("changes", [{"chunks": 4}, {"chunks": 1, "normalize_codes": True}])
def test_a_logit_quantizer_of_several_chunks_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BadRequestError, match=r"vq\.chunks=1"):
        quantizers.build(changed(quantizer="gumbel", **changes))


def test_images_in_unit_range_are_converted_for_the_networks_alone() -> None:
    torch.manual_seed(0)
    signed, unit = Tokenizer(changed()).eval(), Tokenizer(changed(image_range="0,1")).eval()
    unit.load_state_dict(signed.state_dict())
    images = random_images()
    with torch.no_grad():
        torch.testing.assert_close(unit.encoder(images), signed.encoder((images + 1) / 2))
        codes = unit.encode(images)
        vectors = unit.quantize.decode(codes)
        pixels = signed.decoder(signed.post_quant_conv(vectors), vectors)
        torch.testing.assert_close(unit(images).images, 2 * pixels - 1, atol=1e-4, rtol=0)
        torch.testing.assert_close(unit.decode(codes), (2 * pixels - 1).clamp(-1, 1))


def test_without_attention_in_the_middle_its_tensors_are_missing_and_nothing_else() -> None:
    names = set(Tokenizer(changed()).state_dict())
    without = set(Tokenizer(changed(mid_attention=False)).state_dict())
    assert without < names
    assert {name.split(".mid.")[1].split(".")[0] for name in names - without} == {"attn_1"}
