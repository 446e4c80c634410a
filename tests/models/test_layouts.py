"""The tokenizer has the published parameter counts, and the parameter names of the CompVis lineage."""

from __future__ import annotations

import pytest

from movq_cli.models.modulation import SpatialNorm
from movq_cli.settings import ModulationSettings, TokenizerSettings
from tests.models.layouts import KANDINSKY, MIDDLE, MOVQ, VQGAN, count, on_meta, random_images, tiny


def test_the_vqgan_baseline_has_its_parameters_part_by_part() -> None:
    model = on_meta(VQGAN)
    assert count(model) == 72_141_699
    assert count(model.encoder) == 29_298_176
    assert count(model.decoder) == 42_449_795
    assert count(model.quantize) == 262_144
    assert count(model.quant_conv) + count(model.post_quant_conv) == 131_584


def test_both_readings_of_movq_and_the_kandinsky_layout_have_their_parameters() -> None:
    assert count(on_meta(MOVQ)) == 82_692_995
    assert count(on_meta(MIDDLE)) == 82_692_995
    assert count(on_meta(KANDINSKY)) == 67_832_495
    assert count(on_meta(MOVQ).encoder) == count(on_meta(VQGAN).encoder)


def convolutions(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def block_names(name: str, *, widened: bool = False) -> set[str]:
    return convolutions(
        *(f"{name}.{layer}" for layer in ("norm1", "conv1", "norm2", "conv2", *["nin_shortcut"] * widened))
    )


def attention_names(name: str) -> set[str]:
    return convolutions(*(f"{name}.{layer}" for layer in ("norm", "q", "k", "v", "proj_out")))


def test_vqgans_names_are_exactly_those_of_the_published_weights() -> None:
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
def test_a_name_of_the_lineage_has_its_shape(chosen: TokenizerSettings, name: str, shape: tuple[int, ...]) -> None:
    assert on_meta(chosen).state_dict()[name].shape == shape


def modulated_norms(chosen: TokenizerSettings) -> set[str]:
    return {name for name, module in on_meta(chosen).named_modules() if isinstance(module, SpatialNorm)}


def test_movq_modulates_the_26_norms_of_the_middle_and_the_three_coarsest_levels() -> None:
    expected = {f"decoder.mid.block_{block}.norm{norm}" for block in (1, 2) for norm in (1, 2)}
    expected |= {"decoder.mid.attn_1.norm"} | {f"decoder.up.4.attn.{block}.norm" for block in range(3)}
    expected |= {f"decoder.up.{u}.block.{b}.norm{n}" for u in (2, 3, 4) for b in range(3) for n in (1, 2)}
    assert len(expected) == 26
    assert modulated_norms(MOVQ) == expected
    for name in expected:
        norm = on_meta(MOVQ).get_submodule(name)
        assert isinstance(norm, SpatialNorm)
        assert norm.norm_layer.weight is None
        assert norm.conv_y.weight.shape[1:] == norm.conv_b.weight.shape[1:] == (512, 1, 1)


@pytest.mark.parametrize("levels", range(5))
def test_the_output_norm_is_modulated_with_the_finest_level(levels: int) -> None:
    chosen = TokenizerSettings(**{**dict(KANDINSKY), "modulation": ModulationSettings(levels=levels)})
    names = modulated_norms(chosen)
    assert ("decoder.norm_out" in names) == (levels == 4)
    assert {int(name.split(".")[2]) for name in names if ".up." in name} == set(range(4 - levels, 4))
    assert sum(".mid." in name for name in names) == 5
    assert not any(name.startswith("encoder") for name in names)


def test_the_other_reading_modulates_the_middle_alone_from_the_quantized_map() -> None:
    names = modulated_norms(MIDDLE)
    assert len(names) == 5
    assert all(name.startswith("decoder.mid.") for name in names)
    for name in names:
        norm = on_meta(MIDDLE).get_submodule(name)
        assert isinstance(norm, SpatialNorm)
        assert norm.conv_y.weight.shape == (512, 256, 3, 3)
    assert on_meta(MIDDLE).state_dict()["decoder.initial_feature.projection.weight"].shape == (512, 256, 1, 1)
    assert on_meta(MIDDLE).decoder.conv_in is None


def test_without_modulation_no_norm_is_modulated() -> None:
    assert modulated_norms(VQGAN) == set()


def test_up_0_and_down_0_work_at_the_images_own_size() -> None:
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
