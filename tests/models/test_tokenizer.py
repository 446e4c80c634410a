"""The complete tokenizer: images to codes and back, and which parameters get gradients."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from movq_cli.models.quantizers.vector import VectorQuantizer
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import CodeShape, ModulationSettings, TokenizerSettings
from tests.models.layouts import MIDDLE, TINY, random_images, tiny


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(2, 6),
    width=st.integers(1, 6),
    feature=st.sampled_from(["quantized", "sinusoid", "constant", "fourier", "projected"]),
)
def test_images_of_any_size_become_codes_and_come_back(batch: int, height: int, width: int, feature: str) -> None:
    model, images = tiny(feature), random_images(batch, 2 * height, 2 * width)
    codes = model.encode(images)
    assert codes.shape == (batch, height, width, 4)
    assert codes.dtype == torch.int64
    assert ((codes >= 0) & (codes < 50)).all()
    back = model.decode(codes)
    assert back.shape == images.shape
    assert back.dtype == torch.float32
    assert back.abs().max() <= 1
    assert not back.requires_grad


@settings(max_examples=8, deadline=None)
@given(
    multipliers=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    chunks=st.sampled_from([1, 2, 4]),
    levels=st.integers(0, 1),
    source=st.sampled_from(["conv_in", "quantized"]),
    kernel_size=st.sampled_from([1, 3]),
)
def test_any_consistent_architecture_gives_its_grid_of_codes(
    multipliers: list[int], blocks: int, chunks: int, levels: int, source: str, kernel_size: int
) -> None:
    chosen = TokenizerSettings(
        resolution=16,
        channels=32,
        multipliers=tuple(multipliers),
        blocks=blocks,
        attention_resolutions=(4,),
        z_channels=5,
        embed_dim=16 * multipliers[-1],
        chunks=chunks,
        codebook_size=9,
        modulation=ModulationSettings(levels=levels, source=source, kernel_size=kernel_size),
    )
    model, images = Tokenizer(chosen), random_images(1)
    factor = 2 ** (len(multipliers) - 1)
    codes = model.encode(images)
    assert codes.shape == (1, 16 // factor, 16 // factor, chunks)
    assert chosen.code_shape == CodeShape(height=16 // factor, width=16 // factor, chunks=chunks, codebook_size=9)
    assert model.quantize.get_parameter("embedding.weight").shape == (9, 16 * multipliers[-1] // chunks)
    assert model.decode(codes).shape == images.shape


@pytest.mark.parametrize("feature", ["quantized", "sinusoid", "constant", "fourier", "projected"])
def test_training_sees_the_images_that_encoding_and_decoding_give_before_clamping(feature: str) -> None:
    model, images = tiny(feature), random_images(3, 16, 12)
    with torch.no_grad():
        seen = model(images)
        assert torch.equal(seen.codes, model.encode(images))
        vectors = model.quantize.decode(seen.codes)
        unclamped = model.decoder(model.post_quant_conv(vectors), vectors)
        torch.testing.assert_close(seen.images, unclamped, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.decoder.conv_out(seen.features), seen.images)
        assert torch.equal(model.quantize.encode(seen.encoded), seen.codes)


@pytest.mark.parametrize("seed", range(3))
def test_an_untrained_tokenizer_decodes_to_what_training_sees(seed: int) -> None:
    torch.manual_seed(seed)
    model, images = Tokenizer(TINY), random_images()
    with torch.no_grad():
        seen = model(images)
    torch.testing.assert_close(model.decode(seen.codes), seen.images.clamp(-1, 1), atol=1e-3, rtol=0)


def test_decoded_images_are_clamped_and_training_images_are_not() -> None:
    model, images = deepcopy(tiny()), random_images()
    nn.init.normal_(model.decoder.conv_out.weight, std=1)
    with torch.no_grad():
        seen = model(images).images
    assert seen.min() < -1.1
    assert seen.max() > 1.1
    back = model.decode(model.encode(images))
    assert (back.min().item(), back.max().item()) == (-1, 1)
    torch.testing.assert_close(back, seen.clamp(-1, 1), atol=1e-3, rtol=0)


def test_under_bf16_autocast_images_and_losses_stay_float32() -> None:
    model, images = tiny(), random_images()
    with torch.autocast("cpu", torch.bfloat16):
        seen, back = model(images), model.decode(model.encode(images))
    assert (
        seen.images.dtype
        == seen.losses["codebook"].dtype
        == seen.losses["commitment"].dtype
        == back.dtype
        == torch.float32
    )
    assert back.abs().max() <= 1


def test_the_losses_of_the_tokenizer_are_those_of_its_quantizer() -> None:
    model, images = tiny(), random_images()
    with torch.no_grad():
        seen = model(images)
        expected = model.quantize(model.quant_conv(model.encoder(images)))
    assert torch.equal(seen.losses["codebook"], expected.losses["codebook"])
    assert torch.equal(seen.losses["commitment"], expected.losses["commitment"])


def test_an_image_is_blind_to_its_batch_even_where_that_is_not_a_number() -> None:
    model, images = tiny(), random_images(3)
    company = images.clone()
    company[0], company[2] = torch.nan, 1e6
    codes = model.encode(company)[1:2]
    assert torch.equal(codes, model.encode(images[1:2]))
    torch.testing.assert_close(model.decode(model.encode(company))[1:2], model.decode(codes), atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(company).images[1:2], model(images[1:2]).images, atol=1e-4, rtol=1e-4)


def test_a_code_reaches_the_whole_image_and_every_chunk_matters() -> None:
    model = tiny()
    codes = torch.randint(0, 50, (1, 8, 8, 4))
    with torch.no_grad():
        vectors = model.quantize.decode(codes)
        before = model.decoder(model.post_quant_conv(vectors), vectors)
        for chunk in range(4):
            changed = codes.clone()
            changed[0, 3, 5, chunk] = (codes[0, 3, 5, chunk] + 7) % 50
            vectors = model.quantize.decode(changed)
            moved = (model.decoder(model.post_quant_conv(vectors), vectors) - before).abs()
            assert moved[..., 6:8, 10:12].min() > 1e-4
            assert moved.amax(1).min() > 0  # attention and the norms' statistics carry it everywhere


# --- gradients -------------------------------------------------------------------------------------------------------


def learning(model: Tokenizer) -> dict[str, nn.Parameter]:
    """Every parameter but attention's key biases, which shift all of a query's logits alike: theirs is rounding."""
    return {name: parameter for name, parameter in model.named_parameters() if not name.endswith(".k.bias")}


def without_gradient(model: Tokenizer) -> set[str]:
    return {
        name
        for name, parameter in learning(model).items()
        if parameter.grad is None or parameter.grad.count_nonzero() == 0
    }


def under(model: Tokenizer, *prefixes: str) -> set[str]:
    return {name for name in learning(model) if name.startswith(prefixes)}


def backward(model: Tokenizer, images: Tensor, *, with_codes: bool = True) -> None:
    model.zero_grad()
    seen = model(images)
    loss = 100 * (seen.images - images).square().mean()
    if with_codes:
        loss = loss + seen.losses["codebook"] + seen.losses["commitment"]
    loss.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def wide(feature: str, modulation: ModulationSettings | None = TINY.modulation) -> Tokenizer:
    """Two channels and more a group: with one, a norm takes the bias before it out and the bias learns nothing."""
    torch.manual_seed(0)
    values = {**dict(TINY), "channels": 64, "embed_dim": 64, "initial_feature": feature, "modulation": modulation}
    model = Tokenizer(TokenizerSettings.model_validate(values))
    assert isinstance(model.quantize, VectorQuantizer)
    nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model


def test_vqgan_learns_everywhere_at_once() -> None:
    model = wide("quantized", None)
    backward(model, random_images(4))
    assert without_gradient(model) == set()


def test_movq_learns_everywhere_at_once_but_behind_its_maps_only_from_the_second_step() -> None:
    model, images = wide("fourier"), random_images(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, images)
    # The maps start at weight 0, so that nothing passes through them to conv_in(z_q), which serves them alone.
    behind_the_maps = under(model, "decoder.conv_in", "post_quant_conv")
    assert without_gradient(model) == behind_the_maps
    optimizer.step()
    backward(model, images)
    assert without_gradient(model) == set()


def test_the_other_reading_learns_everywhere_at_once_but_in_a_convolution_that_nothing_reads() -> None:
    model = wide("projected", MIDDLE.modulation)
    backward(model, random_images(4))
    # The paper's count includes post_quant_conv, but F0 and the maps both come from the quantized vectors themselves.
    assert without_gradient(model) == under(model, "post_quant_conv")


@pytest.mark.parametrize("feature", ["sinusoid", "constant"])
def test_features_that_know_no_code_leave_the_encoder_to_the_commitment_loss_for_one_step(feature: str) -> None:
    model, images = wide(feature), random_images(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, images, with_codes=False)
    before_the_maps = under(model, "encoder", "quant_conv", "quantize", "post_quant_conv", "decoder.conv_in")
    assert without_gradient(model) == before_the_maps
    optimizer.step()
    backward(model, images)
    assert without_gradient(model) == set()


def test_the_image_moves_no_codebook_entry_but_through_the_codebook_loss() -> None:
    model = wide("fourier")
    backward(model, random_images(2), with_codes=False)
    assert "quantize.embedding.weight" in without_gradient(model)
    assert "encoder.conv_in.weight" not in without_gradient(model)
