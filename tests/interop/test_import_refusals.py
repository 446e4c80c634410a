"""What is wrong with a file or with its config is refused, and the error names the tensor or the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from movq_cli.errors import BadRequestError
from tests.interop import peers


def vqgan() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in peers.tokenizer(peers.VQGAN).state_dict().items()}


MISSING = [
    "encoder.conv_in.weight",
    "encoder.down.1.block.0.norm2.bias",
    "encoder.down.0.downsample.conv.weight",
    "encoder.mid.attn_1.q.weight",
    "decoder.up.1.attn.1.proj_out.bias",
    "decoder.conv_in.weight",
    "quantize.embedding.weight",
    "quant_conv.bias",
    "post_quant_conv.weight",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    state = vqgan()
    del state[name]
    with pytest.raises(BadRequestError, match=rf"{name} is missing"):
        peers.load(peers.lightning(tmp_path / "a.ckpt", state))


@pytest.mark.parametrize(
    "name", ["encoder.extra.weight", "decoder.up.0.block.2.conv1.weight", "temperature", "quantize.embedding.bias"]
)
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRequestError, match=name.replace(".", r"\.")):
        peers.load(peers.lightning(tmp_path / "a.ckpt", {**vqgan(), name: torch.ones(32, 32, 3, 3)}))


@pytest.mark.parametrize("name", ["decoder.mid.block_2.conv1.weight", "quant_conv.weight", "encoder.norm_out.bias"])
@pytest.mark.parametrize("change", ["transposed", "longer", "flat", "empty"])
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str, change: str) -> None:
    state = vqgan()
    tensor = state[name]
    changed = {
        "transposed": tensor.unsqueeze(0).transpose(0, -1),
        "longer": torch.cat([tensor, tensor]),
        "flat": tensor.flatten()[:-1],
        "empty": tensor[:0],
    }
    state[name] = changed[change].contiguous()
    with pytest.raises(BadRequestError, match=r"is \[|has not"):
        peers.load(peers.lightning(tmp_path / "a.ckpt", state))


def test_names_are_those_of_the_file(tmp_path: Path) -> None:
    state = peers.in_diffusers(vqgan(), 2)
    del state["decoder.up_blocks.1.resnets.0.conv_shortcut.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadRequestError, match=r"decoder\.up_blocks\.1\.resnets\.0\.conv_shortcut\.bias is missing"):
        peers.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    state = vqgan()
    state["decoder.conv_out.weight"][0, 0, 1, 1] = value
    with pytest.raises(BadRequestError, match=r"decoder\.conv_out\.weight holds NaN or infinite"):
        peers.load(peers.lightning(tmp_path / "a.ckpt", state))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(32, 3, 3, 3, dtype=torch.int64),
        torch.zeros(32, 3, 3, 3).to_sparse(),
        torch.zeros(1).expand(32, 3, 3, 3),
        "text",
        None,
    ],
    ids=["integers", "sparse", "expanded", "text", "nothing"],
)
def test_what_is_no_dense_tensor_of_floats_is_named(tmp_path: Path, value: object) -> None:
    path = peers.lightning(tmp_path / "a.ckpt", {**vqgan(), "encoder.conv_in.weight": value})  # type: ignore[dict-item]
    with pytest.raises(BadRequestError, match=r"encoder\.conv_in\.weight"):
        peers.load(path)


def test_models_that_are_no_vq_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    kl = {name: tensor for name, tensor in vqgan().items() if not name.startswith("quantize.")}
    kl["encoder.conv_out.weight"] = torch.randn(16, 64, 3, 3)
    kl["encoder.conv_out.bias"] = torch.randn(16)
    kl["quant_conv.weight"], kl["quant_conv.bias"] = torch.randn(12, 16, 1, 1), torch.randn(12)
    cases: dict[str, dict[str, Tensor]] = {
        "KL autoencoder": kl,
        "remapped": {**vqgan(), "quantize.used": torch.zeros(5)},
        "known family": {"fc.weight": torch.zeros(3, 3)},
    }
    for reason, state in cases.items():
        with pytest.raises(BadRequestError, match=reason):
            peers.load(peers.lightning(tmp_path / "a.ckpt", state))


def test_images_of_one_channel_are_refused(tmp_path: Path) -> None:
    state = vqgan()
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"][:, :1].contiguous()
    with pytest.raises(BadRequestError, match="1 channels"):
        peers.load(peers.lightning(tmp_path / "a.ckpt", state))


CONTRADICTIONS = {
    "ch": 64,
    "ch_mult": [1, 1],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "z_channels": 16,
    "out_ch": 1,
    "attn_type": "none",
    "double_z": True,
    "tanh_out": True,
}


@pytest.mark.parametrize(("key", "value"), CONTRADICTIONS.items(), ids=CONTRADICTIONS)
def test_a_config_that_contradicts_is_refused_with_its_key(tmp_path: Path, key: str, value: object) -> None:
    config = peers.compvis_config(peers.VQGAN)
    config["model"]["params"]["ddconfig"][key] = value
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(config))
    weights = peers.lightning(tmp_path / "a.ckpt", vqgan())
    with pytest.raises(BadRequestError, match=r"other\.yaml (contradicts|describes a model that cannot)"):
        peers.load(weights, config=path)


@pytest.mark.parametrize(("key", "value"), [("n_embed", 21), ("embed_dim", 7)])
def test_a_config_with_another_codebook_is_refused(tmp_path: Path, key: str, value: int) -> None:
    config = peers.compvis_config(peers.VQGAN)
    config["model"]["params"][key] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(BadRequestError, match=rf"{key} means \w+ = {value}, but the tensors have"):
        peers.load(peers.lightning(tmp_path / "a.ckpt", vqgan()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a list",
        "model: {params: {ddconfig: {ch: 32}}}",
        "model: {params: {embed_dim: 6, n_embed: 20, ddconfig: {ch: 32, ch_mult: 7}}}",
        "just: something",
        "!!python/object/apply:os.system ['touch ran']",
        "a: &a [*a]\nb: {",
        "\x00",
        "[" * 500,
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(text)
    weights = peers.lightning(tmp_path / "a.ckpt", vqgan())
    with pytest.raises(BadRequestError, match=r"config\.yaml"):
        peers.load(weights, config=config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "config.yaml"]


def test_a_config_beside_the_weights_that_is_another_programs_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 12}')
    imported = peers.load(peers.lightning(tmp_path / "a.ckpt", vqgan()))
    assert "config.json" not in imported.used
