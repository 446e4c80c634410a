"""Encoder, decoder and tokenizer: sizes, names, every layer against plain formulas, and what reaches what."""

from copy import deepcopy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from movq_cli.models.autoencoder import AttentionBlock, Downsample, ResidualBlock, Upsample
from movq_cli.models.modulation import Norm, SpatialNorm
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import CodeShape, ModulationSettings, TokenizerSettings

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
def on_meta(chosen):
    with torch.device("meta"):
        return Tokenizer(chosen)


@cache
def tiny(initial_feature="fourier"):
    """In eval mode, its weights so random that every norm, map and code matters."""
    torch.manual_seed(0)
    model = Tokenizer(TokenizerSettings(**{**dict(TINY), "initial_feature": initial_feature})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "conv_y" in name or "conv_b" in name:
            nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def random_images(batch=2, height=16, width=16):
    return torch.rand(batch, 3, height, width) * 2 - 1


# --- sizes and names --------------------------------------------------------------------------------------------------


def test_the_vqgan_baseline_has_its_parameters_part_by_part():
    model = on_meta(VQGAN)
    assert count(model) == 72_141_699
    assert count(model.encoder) == 29_298_176
    assert count(model.decoder) == 42_449_795
    assert count(model.quantize) == 262_144
    assert count(model.quant_conv) + count(model.post_quant_conv) == 131_584


def test_both_readings_of_movq_and_the_kandinsky_layout_have_their_parameters():
    assert count(on_meta(MOVQ)) == 82_692_995
    assert count(on_meta(MIDDLE)) == 82_692_995
    assert count(on_meta(KANDINSKY)) == 67_832_495
    assert count(on_meta(MOVQ).encoder) == count(on_meta(VQGAN).encoder)


def convolutions(*names):
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def block_names(name, *, widened=False):
    return convolutions(
        *(f"{name}.{layer}" for layer in ("norm1", "conv1", "norm2", "conv2", *["nin_shortcut"] * widened))
    )


def attention_names(name):
    return convolutions(*(f"{name}.{layer}" for layer in ("norm", "q", "k", "v", "proj_out")))


def test_vqgans_names_are_exactly_those_of_the_published_weights():
    expected = convolutions("quant_conv", "post_quant_conv") | {"quantize.embedding.weight"}
    for side in ("encoder", "decoder"):
        expected |= convolutions(f"{side}.conv_in", f"{side}.norm_out", f"{side}.conv_out")
        expected |= block_names(f"{side}.mid.block_1") | block_names(f"{side}.mid.block_2")
        expected |= attention_names(f"{side}.mid.attn_1")
    for level in range(5):
        for block in range(2):
            expected |= block_names(f"encoder.down.{level}.block.{block}", widened=level in (2, 4) and block == 0)
        for block in range(3):
            expected |= block_names(f"decoder.up.{level}.block.{block}", widened=level in (1, 3) and block == 0)
        if level < 4:
            expected |= convolutions(f"encoder.down.{level}.downsample.conv")
        if level > 0:
            expected |= convolutions(f"decoder.up.{level}.upsample.conv")
    for block in range(2):
        expected |= attention_names(f"encoder.down.4.attn.{block}")
    for block in range(3):
        expected |= attention_names(f"decoder.up.4.attn.{block}")
    assert set(on_meta(VQGAN).state_dict()) == expected


@pytest.mark.parametrize(
    ("chosen", "name", "shape"),
    [
        (VQGAN, "encoder.conv_in.weight", (128, 3, 3, 3)),
        (VQGAN, "encoder.down.2.block.0.nin_shortcut.weight", (256, 128, 1, 1)),
        (VQGAN, "encoder.down.0.downsample.conv.weight", (128, 128, 3, 3)),
        (VQGAN, "encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        (VQGAN, "encoder.conv_out.weight", (256, 512, 3, 3)),
        (VQGAN, "decoder.conv_in.weight", (512, 256, 3, 3)),
        (VQGAN, "decoder.up.4.block.0.conv1.weight", (512, 512, 3, 3)),
        (VQGAN, "decoder.up.3.block.0.nin_shortcut.weight", (256, 512, 1, 1)),
        (VQGAN, "decoder.up.0.block.2.conv2.weight", (128, 128, 3, 3)),
        (VQGAN, "decoder.conv_out.weight", (3, 128, 3, 3)),
        (VQGAN, "quantize.embedding.weight", (1024, 256)),
        (MOVQ, "quantize.embedding.weight", (1024, 64)),
        (MOVQ, "post_quant_conv.weight", (256, 256, 1, 1)),
        (MOVQ, "decoder.mid.attn_1.norm.conv_y.weight", (512, 512, 1, 1)),
        (MOVQ, "decoder.up.2.block.0.norm1.conv_b.weight", (256, 512, 1, 1)),
        (MOVQ, "decoder.up.1.block.0.norm1.weight", (256,)),
        (KANDINSKY, "quantize.embedding.weight", (16_384, 4)),
        (KANDINSKY, "decoder.mid.block_1.norm1.norm_layer.weight", (512,)),
        (KANDINSKY, "decoder.up.3.attn.2.norm.conv_y.weight", (512, 4, 1, 1)),
        (KANDINSKY, "decoder.up.0.block.0.norm1.conv_b.bias", (256,)),
        (KANDINSKY, "decoder.norm_out.conv_y.weight", (128, 4, 1, 1)),
    ],
)
def test_a_name_of_the_lineage_has_its_shape(chosen, name, shape):
    assert on_meta(chosen).state_dict()[name].shape == shape


def modulated_norms(chosen):
    return {name for name, module in on_meta(chosen).named_modules() if isinstance(module, SpatialNorm)}


def test_movq_modulates_the_26_norms_of_the_middle_and_the_three_coarsest_levels():
    expected = {f"decoder.mid.block_{block}.norm{norm}" for block in (1, 2) for norm in (1, 2)}
    expected |= {"decoder.mid.attn_1.norm"} | {f"decoder.up.4.attn.{block}.norm" for block in range(3)}
    expected |= {f"decoder.up.{u}.block.{b}.norm{n}" for u in (2, 3, 4) for b in range(3) for n in (1, 2)}
    assert len(expected) == 26
    assert modulated_norms(MOVQ) == expected
    for name in expected:
        norm = on_meta(MOVQ).get_submodule(name)
        assert norm.norm_layer.weight is None
        assert norm.conv_y.weight.shape[1:] == norm.conv_b.weight.shape[1:] == (512, 1, 1)


@pytest.mark.parametrize("levels", range(5))
def test_the_output_norm_is_modulated_with_the_finest_level(levels):
    chosen = TokenizerSettings(**{**dict(KANDINSKY), "modulation": ModulationSettings(levels=levels)})
    names = modulated_norms(chosen)
    assert ("decoder.norm_out" in names) == (levels == 4)
    assert {int(name.split(".")[2]) for name in names if ".up." in name} == set(range(4 - levels, 4))
    assert sum(".mid." in name for name in names) == 5
    assert not any(name.startswith("encoder") for name in names)


def test_the_other_reading_modulates_the_middle_alone_from_the_quantized_map():
    names = modulated_norms(MIDDLE)
    assert len(names) == 5
    assert all(name.startswith("decoder.mid.") for name in names)
    for name in names:
        assert on_meta(MIDDLE).get_submodule(name).conv_y.weight.shape == (512, 256, 3, 3)
    assert on_meta(MIDDLE).state_dict()["decoder.initial_feature.projection.weight"].shape == (512, 256, 1, 1)
    assert on_meta(MIDDLE).decoder.conv_in is None


def test_without_modulation_no_norm_is_modulated():
    assert modulated_norms(VQGAN) == set()


def test_up_0_and_down_0_work_at_the_images_own_size():
    model, seen = tiny(), {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, out, name=name: seen.update({name: (inputs, out)})
        )
        for name in ("decoder.up.0", "decoder.up.1", "encoder.down.0", "encoder.down.1")
    ]
    model(random_images(1, 16, 24))
    for handle in handles:
        handle.remove()
    sides = {name: (inputs[0].shape[-2:], out.shape[-2:]) for name, (inputs, out) in seen.items()}
    fine, coarse = (16, 24), (8, 12)
    assert list(sides) == ["encoder.down.0", "encoder.down.1", "decoder.up.1", "decoder.up.0"]
    assert sides["encoder.down.0"] == sides["decoder.up.1"][::-1] == (fine, coarse)
    assert sides["encoder.down.1"] == (coarse, coarse)
    assert sides["decoder.up.0"] == (fine, fine)


# --- every layer against plain formulas -------------------------------------------------------------------------------


def ready(module):
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module, {name: parameter.detach() for name, parameter in module.named_parameters()}


def plain_norm(weights, name, x, condition):
    """GroupNorm of 32 groups, modulated where the weights have maps for it."""
    prefix = f"{name}.norm_layer" if f"{name}.conv_y.weight" in weights else name
    out = F.group_norm(x, 32, weights.get(f"{prefix}.weight"), weights.get(f"{prefix}.bias"), eps=1e-6)
    if prefix == name:
        return out
    wide = F.interpolate(condition, size=x.shape[-2:])
    return out * plain_conv(weights, f"{name}.conv_y", wide) + plain_conv(weights, f"{name}.conv_b", wide)


def plain_conv(weights, name, x):
    kernel = weights[f"{name}.weight"]
    return F.conv2d(x, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)


def plain_block(weights, name, x, condition=None):
    h = plain_norm(weights, f"{name}norm1", x, condition)
    h = plain_conv(weights, f"{name}conv1", h * torch.sigmoid(h))
    h = plain_norm(weights, f"{name}norm2", h, condition)
    h = plain_conv(weights, f"{name}conv2", h * torch.sigmoid(h))
    return h + (plain_conv(weights, f"{name}nin_shortcut", x) if f"{name}nin_shortcut.weight" in weights else x)


def plain_attention(weights, name, x, condition=None):
    h = plain_norm(weights, f"{name}norm", x, condition)
    q, k, v = (plain_conv(weights, f"{name}{part}", h).flatten(2) for part in "qkv")
    weight = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(-1)
    out = torch.einsum("bij,bcj->bci", weight, v).view(x.shape)
    return x + plain_conv(weights, f"{name}proj_out", out)


def plain_down(weights, name, x):
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1, dtype=x.dtype)
    padded[:, :, :-1, :-1] = x
    kernel = weights[f"{name}weight"]
    out = weights[f"{name}bias"][None, :, None, None].repeat(len(x), 1, x.shape[2] // 2, x.shape[3] // 2)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            out[:, :, i, j] += torch.einsum("bchw,ochw->bo", padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel)
    return out


def plain_up(weights, name, x):
    return F.conv2d(
        x.repeat_interleave(2, 2).repeat_interleave(2, 3), weights[f"{name}weight"], weights[f"{name}bias"], padding=1
    )


def plain_level(weights, name, x, condition=None):
    for block in range(8):
        if f"{name}.block.{block}.conv1.weight" in weights:
            x = plain_block(weights, f"{name}.block.{block}.", x, condition)
        if f"{name}.attn.{block}.q.weight" in weights:
            x = plain_attention(weights, f"{name}.attn.{block}.", x, condition)
    return x


def plain_middle(weights, name, x, condition=None):
    x = plain_block(weights, f"{name}.block_1.", x, condition)
    x = plain_attention(weights, f"{name}.attn_1.", x, condition)
    return plain_block(weights, f"{name}.block_2.", x, condition)


def plain_encoder(weights, levels, images):
    h = plain_conv(weights, "encoder.conv_in", images)
    for level in range(levels):
        h = plain_level(weights, f"encoder.down.{level}", h)
        if level < levels - 1:
            h = plain_down(weights, f"encoder.down.{level}.downsample.conv.", h)
    h = plain_norm(weights, "encoder.norm_out", plain_middle(weights, "encoder.mid", h), None)
    return plain_conv(weights, "encoder.conv_out", h * torch.sigmoid(h))


def plain_decoder(weights, levels, quantized, *, fourier, raw):
    first = None
    if "decoder.conv_in.weight" in weights:
        first = plain_conv(weights, "decoder.conv_in", plain_conv(weights, "post_quant_conv", quantized))
    angle = 2 * torch.pi * quantized
    h, condition = torch.cat([angle.sin(), angle.cos()], 1) if fourier else first, quantized if raw else first
    if "decoder.initial_feature.projection.weight" in weights:
        h = plain_conv(weights, "decoder.initial_feature.projection", quantized).sin()
    h = plain_middle(weights, "decoder.mid", h, condition)
    for level in reversed(range(levels)):
        h = plain_level(weights, f"decoder.up.{level}", h, condition)
        if level > 0:
            h = plain_up(weights, f"decoder.up.{level}.upsample.conv.", h)
    h = plain_norm(weights, "decoder.norm_out", h, condition)
    return plain_conv(weights, "decoder.conv_out", h * torch.sigmoid(h))


@pytest.mark.parametrize("widths", [(64, 64), (32, 64), (64, 32)])
@pytest.mark.parametrize("modulated", [False, True])
def test_a_residual_block_is_its_formula(widths, modulated):
    torch.manual_seed(0)
    make_norm = (lambda channels: SpatialNorm(channels, 5, ModulationSettings())) if modulated else Norm
    block, weights = ready(ResidualBlock(*widths, make_norm))
    x, condition = torch.randn(2, widths[0], 6, 4).double(), torch.randn(2, 5, 3, 2).double()
    assert ("nin_shortcut.weight" in weights) == (widths[0] != widths[1])
    torch.testing.assert_close(block(x, condition), plain_block(weights, "", x, condition), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("modulated", [False, True])
def test_attention_is_its_formula_with_an_explicit_softmax(modulated):
    torch.manual_seed(0)
    make_norm = (lambda channels: SpatialNorm(channels, 5, ModulationSettings())) if modulated else Norm
    block, weights = ready(AttentionBlock(64, make_norm))
    x, condition = torch.randn(2, 64, 6, 4).double(), torch.randn(2, 5, 3, 2).double()
    torch.testing.assert_close(block(x, condition), plain_attention(weights, "", x, condition), atol=1e-10, rtol=1e-10)


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 2), height=st.integers(1, 4), width=st.integers(1, 4))
def test_downsampling_pads_right_and_below_and_upsampling_repeats(batch, height, width):
    down, down_weights = ready(Downsample(3).conv)
    up, up_weights = ready(Upsample(3).conv)
    outer_down, outer_up = Downsample(3), Upsample(3)
    outer_down.conv, outer_up.conv = down, up
    x = torch.randn(batch, 3, 2 * height, 2 * width).double()
    torch.testing.assert_close(outer_down(x), plain_down(down_weights, "", x), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(outer_up(x), plain_up(up_weights, "", x), atol=1e-11, rtol=1e-11)


REFERENCES = {
    "movq": TINY,
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


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 2), height=st.integers(1, 4), width=st.integers(1, 4), seed=st.integers(0, 100))
def test_the_shortcut_of_upsampling_has_the_gradients_of_its_two_steps(batch, height, width, seed):
    torch.manual_seed(seed)
    up = Upsample(6).double()
    x = torch.randn(batch, 6, height, width, dtype=torch.float64, requires_grad=True)
    downstream = torch.randn(batch, 6, 2 * height, 2 * width, dtype=torch.float64)
    learned = (x, up.conv.weight, up.conv.bias)
    plain = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    for ours, theirs in zip(
        torch.autograd.grad(up(x), learned, downstream), torch.autograd.grad(plain, learned, downstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", REFERENCES)
def test_encoder_and_decoder_are_their_formulas_layer_by_layer(layout):
    torch.manual_seed(0)
    chosen = TokenizerSettings.model_validate(dict(REFERENCES[layout]))
    model = Tokenizer(chosen)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "conv_y" in name or "conv_b" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    levels, images = len(chosen.multipliers), random_images(2, 16, 8)
    quantized = 0.3 * torch.randn(2, chosen.embed_dim, 4, 3)
    with torch.no_grad():
        encoded = model.encoder(images)
        decoded = model.decoder(model.post_quant_conv(quantized), quantized)
    expected = plain_encoder(weights, levels, images.double())
    torch.testing.assert_close(encoded.double(), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    fourier, raw = chosen.initial_feature == "fourier", chosen.modulation and chosen.modulation.source == "quantized"
    expected = plain_decoder(weights, levels, quantized.double(), fourier=fourier, raw=raw)
    torch.testing.assert_close(decoded.double(), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


# --- the whole tokenizer ----------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(2, 6),
    width=st.integers(1, 6),
    feature=st.sampled_from(["quantized", "sinusoid", "constant", "fourier", "projected"]),
)
def test_images_of_any_size_become_codes_and_come_back(batch, height, width, feature):
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
def test_any_consistent_architecture_gives_its_grid_of_codes(multipliers, blocks, chunks, levels, source, kernel_size):
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
    assert model.quantize.embedding.weight.shape == (9, 16 * multipliers[-1] // chunks)
    assert model.decode(codes).shape == images.shape


@pytest.mark.parametrize("feature", ["quantized", "sinusoid", "constant", "fourier", "projected"])
def test_training_sees_the_images_that_encoding_and_decoding_give_before_clamping(feature):
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
def test_an_untrained_tokenizer_decodes_to_what_training_sees(seed):
    torch.manual_seed(seed)
    model, images = Tokenizer(TINY), random_images()
    with torch.no_grad():
        seen = model(images)
    torch.testing.assert_close(model.decode(seen.codes), seen.images.clamp(-1, 1), atol=1e-3, rtol=0)


def test_decoded_images_are_clamped_and_training_images_are_not():
    model, images = deepcopy(tiny()), random_images()
    nn.init.normal_(model.decoder.conv_out.weight, std=1)
    with torch.no_grad():
        seen = model(images).images
    assert seen.min() < -1.1
    assert seen.max() > 1.1
    back = model.decode(model.encode(images))
    assert (back.min(), back.max()) == (-1, 1)
    torch.testing.assert_close(back, seen.clamp(-1, 1), atol=1e-3, rtol=0)


def test_under_bf16_autocast_images_and_losses_stay_float32():
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


def test_the_losses_of_the_tokenizer_are_those_of_its_quantizer():
    model, images = tiny(), random_images()
    with torch.no_grad():
        seen = model(images)
        expected = model.quantize(model.quant_conv(model.encoder(images)))
    assert torch.equal(seen.losses["codebook"], expected.losses["codebook"])
    assert torch.equal(seen.losses["commitment"], expected.losses["commitment"])


def test_an_image_is_blind_to_its_batch_even_where_that_is_not_a_number():
    model, images = tiny(), random_images(3)
    company = images.clone()
    company[0], company[2] = torch.nan, 1e6
    codes = model.encode(company)[1:2]
    assert torch.equal(codes, model.encode(images[1:2]))
    torch.testing.assert_close(model.decode(model.encode(company))[1:2], model.decode(codes), atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(company).images[1:2], model(images[1:2]).images, atol=1e-4, rtol=1e-4)


def test_a_code_reaches_the_whole_image_and_every_chunk_matters():
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


# --- what learns ------------------------------------------------------------------------------------------------------


def learning(model):
    """Every parameter but attention's key biases, which shift all of a query's logits alike: theirs is rounding."""
    return {name: parameter for name, parameter in model.named_parameters() if not name.endswith(".k.bias")}


def without_gradient(model):
    return {
        name
        for name, parameter in learning(model).items()
        if parameter.grad is None or parameter.grad.count_nonzero() == 0
    }


def under(model, *prefixes):
    return {name for name in learning(model) if name.startswith(prefixes)}


def backward(model, images, *, with_codes=True):
    model.zero_grad()
    seen = model(images)
    loss = 100 * (seen.images - images).square().mean()
    if with_codes:
        loss = loss + seen.losses["codebook"] + seen.losses["commitment"]
    loss.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def wide(feature, modulation=TINY.modulation):
    """Two channels and more a group: with one, a norm takes the bias before it out and the bias learns nothing."""
    torch.manual_seed(0)
    values = {**dict(TINY), "channels": 64, "embed_dim": 64, "initial_feature": feature, "modulation": modulation}
    model = Tokenizer(TokenizerSettings.model_validate(values))
    nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model


def test_attention_learns_everywhere_but_in_the_bias_of_the_keys():
    torch.manual_seed(0)
    block, _ = ready(AttentionBlock(64, Norm))
    (block(torch.randn(2, 64, 3, 4).double()) * torch.randn(2, 64, 3, 4).double()).sum().backward()
    for name, parameter in block.named_parameters():
        size = parameter.grad.abs().max()
        assert size < 1e-11 if name == "k.bias" else size > 1e-3, name


def test_vqgan_learns_everywhere_at_once():
    model = wide("quantized", None)
    backward(model, random_images(4))
    assert without_gradient(model) == set()


def test_movq_learns_everywhere_at_once_but_behind_its_maps_only_from_the_second_step():
    model, images = wide("fourier"), random_images(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, images)
    # The maps start at weight 0, so that nothing passes through them to conv_in(z_q), which serves them alone.
    behind_the_maps = under(model, "decoder.conv_in", "post_quant_conv")
    assert without_gradient(model) == behind_the_maps
    optimizer.step()
    backward(model, images)
    assert without_gradient(model) == set()


def test_the_other_reading_learns_everywhere_at_once_but_in_a_convolution_that_nothing_reads():
    model = wide("projected", MIDDLE.modulation)
    backward(model, random_images(4))
    # The paper's count includes post_quant_conv, but F0 and the maps both come from the quantized vectors themselves.
    assert without_gradient(model) == under(model, "post_quant_conv")


@pytest.mark.parametrize("feature", ["sinusoid", "constant"])
def test_features_that_know_no_code_leave_the_encoder_to_the_commitment_loss_for_one_step(feature):
    model, images = wide(feature), random_images(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, images, with_codes=False)
    before_the_maps = under(model, "encoder", "quant_conv", "quantize", "post_quant_conv", "decoder.conv_in")
    assert without_gradient(model) == before_the_maps
    optimizer.step()
    backward(model, images)
    assert without_gradient(model) == set()


def test_the_image_moves_no_codebook_entry_but_through_the_codebook_loss():
    model = wide("fourier")
    backward(model, random_images(2), with_codes=False)
    assert "quantize.embedding.weight" in without_gradient(model)
    assert "encoder.conv_in.weight" not in without_gradient(model)


# --- the settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"multipliers": ()}, "multipliers is empty"),
        ({"channels": 48}, r"widths \[48, 48\].*multiple of 32"),
        ({"resolution": 250}, "resolution 250 is not a multiple of the downsampling factor 16"),
        ({"resolution": 8}, "resolution 8 is not a multiple"),
        ({"chunks": 3}, "embed_dim 256 does not divide into 3 chunks"),
        ({"chunks": 512}, "does not divide into 512 chunks"),
        ({"modulation": {"levels": 6}}, "levels is 6, but the decoder has 5 levels"),
        ({"embed_dim": 128}, "set embed_dim to 256"),
        ({"multipliers": (1, 1, 2, 2, 2)}, "set embed_dim to 128"),
        ({"modulation": None}, "'fourier' without modulation"),
        ({"modulation": None, "initial_feature": "sinusoid"}, "'sinusoid' without modulation"),
        ({"modulation": None, "initial_feature": "constant"}, "'constant' without modulation"),
        ({"modulation": None, "initial_feature": "projected"}, "'projected' without modulation"),
        ({"codebook_size": 1}, "codebook_size"),
        ({"codebook_size": 65_537}, "codebook_size"),
        ({"channels": 0}, "channels"),
        ({"blocks": 0}, "blocks"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"modulation": {"levels": -1}}, "levels"),
        ({"modulation": {"kernel_size": 5}}, "kernel_size"),
        ({"modulation": {"source": "image"}}, "source"),
        ({"initial_feature": "noise"}, "initial_feature"),
        ({"chanels": 128}, "chanels"),
        ({"modulation": {"level": 3}}, "level"),
    ],
)
def test_inconsistent_settings_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        TokenizerSettings.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"modulation": {"levels": 5}},
        {"modulation": {"levels": 0}},
        {"modulation": None, "initial_feature": "quantized"},
        {"embed_dim": 128, "initial_feature": "constant"},
        {"codebook_size": 65_536, "chunks": 256},
        {"codebook_size": 2, "resolution": 16},
    ],
)
def test_settings_at_the_edge_are_accepted(values):
    TokenizerSettings.model_validate(values)


def test_settings_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        MOVQ.channels = 64


def test_sizes_follow_from_the_settings():
    assert (MOVQ.factor, MOVQ.grid, MOVQ.code_dim, MOVQ.widths) == (16, 16, 64, (128, 128, 256, 256, 512))
    assert (KANDINSKY.factor, KANDINSKY.grid, KANDINSKY.code_dim) == (8, 32, 4)
    assert (MOVQ.code_shape.positions, MOVQ.code_shape.codes) == (256, 1024)
