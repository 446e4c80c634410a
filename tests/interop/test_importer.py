"""Files of each family give the tokenizer that they hold, exactly, or an error that names what is wrong."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from movq_cli.errors import BadRequestError
from movq_cli.interop.importer import Imported
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import ModulationSettings, TokenizerSettings
from tests.interop import peers
from tests.interop.maskgit_reference import MaskGITReference


def built(imported: Imported) -> Tokenizer:
    model = Tokenizer(imported.settings).eval()
    model.load_state_dict(imported.tensors)
    return model


def assert_same(imported: Imported, expected: Tokenizer) -> None:
    """Check that an imported tokenizer has the settings of another one, and computes the same, bit for bit."""
    assert imported.settings == expected.settings
    pictures = peers.images()
    with torch.no_grad():
        ours, theirs = built(imported)(pictures), expected(pictures)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.images, theirs.images)


COMPVIS = {
    "vqgan": (peers.VQGAN, "taming.models.vqgan.VQModel"),
    "three levels": (peers.THREE_LEVELS, "ldm.models.autoencoder.VQModelInterface"),
    "no attention": (peers.NO_ATTENTION, "ldm.models.autoencoder.VQModel"),
    "movq": (peers.MOVQ, "movqgan.models.vqgan.MOVQ"),
    "gumbel": (peers.GUMBEL, "taming.models.vqgan.GumbelVQ"),
}


@pytest.mark.parametrize(("settings", "target"), COMPVIS.values(), ids=COMPVIS)
@pytest.mark.parametrize("container", ["lightning", "state dict", "older than zip", "safetensors"])
def test_every_tokenizer_of_compvis_is_read_from_every_container(
    tmp_path: Path, settings: TokenizerSettings, target: str, container: str
) -> None:
    model = peers.tokenizer(settings)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "last.ckpt"
    match container:
        case "lightning":
            peers.lightning(path, state)
        case "state dict":
            peers.write(path, state)
        case "older than zip":
            peers.write(path, {"state_dict": state}, legacy=True)
        case "safetensors":
            save_file(state, path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(peers.compvis_config(settings, target)))
    imported = peers.load(path)
    assert_same(imported, model)
    assert imported.family == "compvis"


def test_without_a_config_the_levels_of_attention_are_kept_at_the_given_resolution(tmp_path: Path) -> None:
    model = peers.tokenizer(peers.THREE_LEVELS)
    path = peers.lightning(tmp_path / "a.ckpt", model.state_dict())
    assert peers.load(path).settings.attention_resolutions == (128, 64)
    assert "resolution 256" in " ".join(peers.load(path).assumed)
    imported = peers.load(path, resolution=32)
    assert (imported.settings.resolution, imported.settings.attention_resolutions) == (32, (16, 8))
    assert not [text for text in imported.assumed if "resolution" in text]
    assert torch.equal(built(imported).encode(peers.images()), model.encode(peers.images()))


def test_a_tokenizer_inside_another_model_is_found_and_the_rest_is_named(tmp_path: Path) -> None:
    image, condition = peers.tokenizer(peers.VQGAN), peers.tokenizer(peers.NO_ATTENTION, seed=1)
    state = {f"first_stage_model.{name}": tensor for name, tensor in image.state_dict().items()}
    state |= {f"cond_stage_model.{name}": tensor for name, tensor in condition.state_dict().items()}
    state |= {"transformer.pos_emb": torch.zeros(1, 4, 8), "transformer.tok_emb.weight": torch.zeros(9, 8)}
    path = peers.lightning(tmp_path / "last.ckpt", state)
    stages = {
        f"{part}_config": peers.compvis_config(model.settings)["model"]
        for part, model in (("first_stage", image), ("cond_stage", condition))
    }
    config = {"model": {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": stages}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    first = peers.load(path)
    assert_same(first, image)
    assert {"transformer.* (2 tensors)", "epoch", "optimizer_states"} <= set(first.ignored)
    assert "--part cond_stage" in " ".join(first.notes)
    assert_same(peers.load(path, part="cond_stage"), condition)


def test_a_part_that_the_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    path = peers.lightning(tmp_path / "a.ckpt", peers.tokenizer(peers.VQGAN).state_dict())
    with pytest.raises(BadRequestError, match=r"holds no cond_stage_model.*Omit --part"):
        peers.load(path, part="cond_stage")


@pytest.mark.parametrize("kind", ["movqgan", "latent-diffusion", "llamagen"])
def test_averaged_weights_are_imported_when_they_are_named_and_only_then(tmp_path: Path, kind: str) -> None:
    settings = {"movqgan": peers.MOVQ, "latent-diffusion": peers.VQGAN, "llamagen": peers.UNIT}[kind]
    raw, averaged = (peers.tokenizer(settings, seed) for seed in (0, 1))
    path = tmp_path / "a.ckpt"
    state = averaged.state_dict()
    if kind == "llamagen":
        values = {key: peers.in_llamagen(model.state_dict(), 2) for key, model in (("model", raw), ("ema", averaged))}
        peers.write(path, values)
    else:
        twins = {}
        for name, tensor in state.items():
            module, _, rest = name.partition(".")
            dotless = f"model_ema.{name.replace('.', '')}"
            twins[f"ema_{module}.{rest.replace('.', '')}" if kind == "movqgan" else dotless] = tensor
        twins["ema_encoder.decay" if kind == "movqgan" else "model_ema.decay"] = torch.tensor(0.999)
        peers.lightning(path, {**raw.state_dict(), **twins})
    assert_same(peers.load(path, resolution=16), raw)
    assert "--weights ema" in " ".join(peers.load(path).notes)
    assert_same(peers.load(path, resolution=16, weights="ema"), averaged)


def test_averages_that_are_missing_are_refused(tmp_path: Path) -> None:
    state = peers.tokenizer(peers.MOVQ).state_dict()
    with pytest.raises(BadRequestError, match=r"no averaged weights.*Omit --weights ema"):
        peers.load(peers.lightning(tmp_path / "a.ckpt", state), weights="ema")
    incomplete = {**state, "ema_encoder.conv_inweight": state["encoder.conv_in.weight"]}
    with pytest.raises(BadRequestError, match=r"the average of encoder\.\S+ is missing"):
        peers.load(peers.lightning(tmp_path / "b.ckpt", incomplete), weights="ema")


DIFFUSERS = {
    "vqgan": (peers.VQGAN, False),
    "three levels, names before 0.17": (peers.THREE_LEVELS, True),
    "kandinsky": (peers.MOVQ, False),
    "no attention": (peers.NO_ATTENTION, False),
    "eight groups": (peers.varied(channels=24, norm_groups=8), False),
}


@pytest.mark.parametrize(("settings", "old"), DIFFUSERS.values(), ids=DIFFUSERS)
@pytest.mark.parametrize("container", ["safetensors", "bin", "sharded"])
def test_every_vqmodel_of_diffusers_is_read(
    tmp_path: Path, settings: TokenizerSettings, old: bool, container: str
) -> None:
    model = peers.tokenizer(settings)
    state = peers.in_diffusers(model.state_dict(), len(settings.multipliers), old=old)
    (tmp_path / "config.json").write_text(json.dumps(peers.diffusers_config(settings)))
    stem = tmp_path / "diffusion_pytorch_model"
    match container:
        case "safetensors":
            save_file(state, f"{stem}.safetensors")
        case "bin":
            peers.write(Path(f"{stem}.bin"), state)
        case "sharded":
            names = sorted(state)
            places = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
            for shard in set(places.values()):
                save_file({name: state[name] for name in names if places[name] == shard}, tmp_path / shard)
            Path(f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    imported = peers.load(tmp_path)
    assert_same(imported, model)
    assert imported.family == "diffusers"


def test_the_tokenizer_of_amused_reads_images_in_unit_range(tmp_path: Path) -> None:
    settings = peers.varied(attention_resolutions=(), mid_attention=False, image_range="0,1")
    model = peers.tokenizer(settings)
    save_file(peers.in_diffusers(model.state_dict(), 2), tmp_path / "diffusion_pytorch_model.safetensors")
    config = peers.diffusers_config(settings, lookup_from_codebook=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    imported = peers.load(tmp_path)
    assert_same(imported, model)
    assert "image_range 0,1" in " ".join(imported.assumed)
    assert peers.load(tmp_path, image_range="-1,1").settings.image_range == "-1,1"


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_llamagen_is_read_with_the_state_of_its_training(tmp_path: Path, prefix: str) -> None:
    model = peers.tokenizer(peers.UNIT)
    state = {f"{prefix}{name}": tensor for name, tensor in peers.in_llamagen(model.state_dict(), 2).items()}
    arguments = argparse.Namespace(codebook_size=20, codebook_embed_dim=6, codebook_l2_norm=True, image_size=16)
    path = peers.write(tmp_path / "0005000.pt", {"model": state, "optimizer": {}, "steps": 5000, "args": arguments})
    imported = peers.load(path)
    assert_same(imported, model)
    assert imported.training["l2_weight"] == 1
    assert {"quantize.codebook_used", "optimizer", "args"} <= {text.removeprefix(prefix) for text in imported.ignored}


def test_llamagen_without_unit_length_is_known_by_its_arguments(tmp_path: Path) -> None:
    model = peers.tokenizer(peers.VQGAN)
    arguments = argparse.Namespace(codebook_size=20, codebook_embed_dim=6, codebook_l2_norm=False, image_size=16)
    state = peers.in_llamagen(model.state_dict(), 2)
    assert_same(peers.load(peers.write(tmp_path / "a.pt", {"model": state, "args": arguments})), model)


@pytest.mark.parametrize(("multipliers", "blocks"), [((1, 2), 2), ((1, 1, 2), 1), ((2, 1), 1), ((1,), 1)])
def test_maskgit_computes_what_its_own_layers_do(tmp_path: Path, multipliers: tuple[int, ...], blocks: int) -> None:
    torch.manual_seed(0)
    peer = MaskGITReference(multipliers, blocks).eval().requires_grad_(False)
    for name, parameter in peer.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model = built(peers.load(peers.write(tmp_path / "a.bin", peer.state_dict())))
    assert (model.settings.image_range, model.settings.mid_attention) == ("0,1", False)
    pictures = peers.images()
    codes, pixels = peer((pictures + 1) / 2)
    with torch.no_grad():
        ours = model(pictures)
    assert torch.equal(ours.codes[..., 0], codes)
    torch.testing.assert_close(ours.images, 2 * pixels - 1, atol=2e-5, rtol=0)


def test_half_precision_and_a_width_that_changes_are_read(tmp_path: Path) -> None:
    model = peers.tokenizer(peers.VQGAN).half().float()
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    assert_same(peers.load(peers.lightning(tmp_path / "a.ckpt", state), resolution=16), model)


def test_the_discriminator_of_a_file_is_imported_with_its_size(tmp_path: Path) -> None:
    state = peers.tokenizer(peers.VQGAN).state_dict()
    imported = peers.load(peers.lightning(tmp_path / "a.ckpt", {**state, **peers.training_tensors()}))
    assert imported.discriminator_size == (4, 1)
    PatchDiscriminator(4, 1).load_state_dict(imported.discriminator)
    # A discriminator with other layers is not needed, so that it is named and left out.
    other = {**peers.training_tensors(), "loss.discriminator.main.3.loc": torch.zeros(1, 8, 1, 1)}
    imported = peers.load(peers.lightning(tmp_path / "b.ckpt", {**state, **other}))
    assert imported.discriminator == {}
    assert "the discriminator" in imported.ignored[-1]


def test_a_modulation_of_some_levels_is_read(tmp_path: Path) -> None:
    settings = peers.varied(modulation=ModulationSettings(levels=1, kernel_size=3, source="conv_in"))
    model = peers.tokenizer(settings)
    assert_same(peers.load(peers.lightning(tmp_path / "a.ckpt", model.state_dict()), resolution=16), model)
