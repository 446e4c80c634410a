"""`movq export`: what is written is read again and computes the same, and what a format cannot hold is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from movq_cli import checkpoints
from movq_cli.api import Tokenizer
from movq_cli.checkpoints import TokenizerHeader
from movq_cli.commands.export import ExportRequest, Format, export
from movq_cli.console import Console
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.interop import exporter
from movq_cli.interop.importer import ImportOptions, import_tokenizer
from movq_cli.settings import ModulationSettings, TokenizerSettings
from tests.conftest import Movq
from tests.interop import peers
from tests.models import layouts


def save(settings: TokenizerSettings, path: Path) -> Path:
    checkpoints.save_weights(path, peers.tokenizer(settings), TokenizerHeader(vq=settings))
    return path


def run_export(settings: TokenizerSettings, folder: Path, to: Format) -> Path:
    out = folder / f"out-{to}"
    export(ExportRequest(save(settings, folder / "tokenizer.safetensors"), out, to), Console(quiet=True))
    return out


ALL = {
    "vqgan": peers.VQGAN,
    "three levels": peers.varied(multipliers=(1, 1, 2), blocks=2, attention_resolutions=(4,)),
    "movq": peers.varied(z_channels=6, modulation=peers.MOVQ.modulation),
    "no attention": peers.NO_ATTENTION,
    "unit range": peers.varied(image_range="0,1"),
}


@pytest.mark.parametrize("settings", ALL.values(), ids=ALL)
@pytest.mark.parametrize("to", ["compvis", "diffusers"])
def test_what_is_exported_is_imported_again_bit_for_bit(
    tmp_path: Path, settings: TokenizerSettings, to: Format
) -> None:
    out = run_export(settings, tmp_path, to)
    imported = import_tokenizer(out, ImportOptions(image_range=settings.image_range))
    assert imported.settings == settings
    model = peers.tokenizer(settings)
    assert all(torch.equal(imported.tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert not list(tmp_path.glob("*.partial"))
    card = (out / "README.md").read_text()
    assert f"{settings.codebook_size} entries" in card
    assert json.loads(card.split("```json")[1].split("```")[0]) == settings.model_dump(mode="json")


def test_the_files_are_those_of_the_other_project(tmp_path: Path) -> None:
    out = run_export(peers.VQGAN, tmp_path, "compvis")
    state = torch.load(out / "model.ckpt", weights_only=True)["state_dict"]
    assert set(state) == set(peers.tokenizer(peers.VQGAN).state_dict())
    config = yaml.safe_load((out / "config.yaml").read_text())
    expected = peers.compvis_config(peers.VQGAN)["model"]
    assert config["model"]["target"] == expected["target"]
    assert {name: config["model"]["params"][name] for name in expected["params"]} == expected["params"]
    out = run_export(peers.VQGAN, tmp_path, "diffusers")
    theirs = peers.in_diffusers(peers.tokenizer(peers.VQGAN).state_dict(), 2)
    written = load_file(out / "diffusion_pytorch_model.safetensors")
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in theirs.items())
    config = json.loads((out / "config.json").read_text())
    expected = peers.diffusers_config(peers.VQGAN)
    assert {name: config[name] for name in expected} == expected


def test_the_logit_quantizer_is_exported_to_the_class_that_has_it(tmp_path: Path) -> None:
    settings = peers.varied(quantizer="gumbel", z_channels=6)
    out = run_export(settings, tmp_path, "compvis")
    assert "taming.models.vqgan.GumbelVQ" in (out / "config.yaml").read_text()
    assert "import GumbelVQ" in (out / "README.md").read_text()
    assert import_tokenizer(out, ImportOptions()).settings == settings


@pytest.mark.parametrize("to", ["compvis", "diffusers"])
def test_codes_of_unit_length_are_exported_as_entries_of_unit_length(tmp_path: Path, to: Format) -> None:
    out = run_export(peers.UNIT, tmp_path, to)
    imported = import_tokenizer(out, ImportOptions())
    assert not imported.settings.normalize_codes
    plain = built(imported.settings, imported.tensors)
    model, pictures = peers.tokenizer(peers.UNIT), peers.images()
    codes = model.encode(pictures)
    assert torch.equal(plain.encode(pictures), codes)
    torch.testing.assert_close(plain.decode(codes), model.decode(codes), atol=1e-4, rtol=0)
    assert "normalize_codes" in (out / "README.md").read_text()


def built(settings: TokenizerSettings, tensors: Any) -> Tokenizer:
    model = Tokenizer(settings).eval()
    model.load_state_dict(tensors)
    return model


REFUSED = {
    "chunks": (layouts.TINY, ("compvis", "diffusers")),
    "norm_groups": (peers.varied(norm_groups=16), ("compvis",)),
    "multipliers": (peers.varied(multipliers=(2, 2)), ("diffusers",)),
    "embed_dim": (peers.MOVQ, ("diffusers",)),
    "quantizer": (peers.varied(quantizer="gumbel", z_channels=6), ("diffusers",)),
    "mid_attention": (peers.varied(mid_attention=False), ("compvis",)),
    "modulation": (peers.varied(modulation=ModulationSettings(levels=1)), ("compvis", "diffusers")),
}


@pytest.mark.parametrize(("name", "case"), REFUSED.items(), ids=REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_the_name_of_the_setting(tmp_path: Path, name: str, case: Any) -> None:
    settings, formats = case
    for to in formats:
        with pytest.raises(BadRequestError, match=rf"vq\.{name} = .*--to safetensors"):
            run_export(settings, tmp_path, to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.safetensors"]
    assert Tokenizer.load(run_export(settings, tmp_path, "safetensors")).settings == settings


def test_an_export_that_computes_something_else_is_a_failure_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = exporter._converted

    def damaged(*arguments: Any) -> Any:
        tensors, config, notes = convert(*arguments)
        tensors["decoder.conv_out.bias"] += 0.01
        return tensors, config, notes

    monkeypatch.setattr(exporter, "_converted", damaged)
    with pytest.raises(FailureError, match="computes something else"):
        run_export(peers.VQGAN, tmp_path, "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.safetensors"]


@pytest.mark.slow
def test_a_trained_run_is_exported_with_its_metrics(trained_once: Path, movq: Movq, tmp_path: Path) -> None:
    run = trained_once / "runs" / "tiny-vq"
    done = movq("export", run, "out", "--to", "safetensors", "--json")
    result = json.loads(done.stdout)
    assert result["files"] == ["README.md", "tokenizer.safetensors"]
    assert result["difference"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "10 steps" in card
    assert "| psnr | " in card
    assert "has the same files already" in movq("export", run, "out", "--to", "safetensors").stderr
    (tmp_path / "out" / "README.md").write_text("mine")
    assert "exists already with other content" in movq("export", run, "out", "--to", "safetensors", code=2).stderr
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert "vq.chunks = 4" in movq("export", run, "other", "--to", "diffusers", code=2).stderr
    assert movq("reconstruct", trained_once / "data", "pictures", "--run", "out", "--split", "val").stdout


@pytest.mark.slow
def test_onnx_graphs_compute_the_same_for_any_number_of_images(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = run_export(peers.UNIT, tmp_path, "onnx")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "decoder.onnx", "encoder.onnx"]
    assert "opset 18" in (out / "README.md").read_text()
    model = peers.tokenizer(peers.UNIT)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    (codes,) = onnxruntime.InferenceSession(out / "encoder.onnx").run(None, {"images": images.numpy()})
    assert torch.equal(torch.from_numpy(codes), model.encode(images))
    (decoded,) = onnxruntime.InferenceSession(out / "decoder.onnx").run(None, {"codes": codes})
    torch.testing.assert_close(torch.from_numpy(decoded), model.decode(torch.from_numpy(codes)), atol=1e-4, rtol=0)


def test_onnx_without_its_packages_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadRequestError, match=r"needs the package onnxruntime.*pip install 'movq\[onnx\]'"):
        run_export(peers.VQGAN, tmp_path, "onnx")
    assert not (tmp_path / "out-onnx").exists()


def test_a_damaged_manifest_of_a_run_is_an_error_and_not_an_empty_part_of_the_model_card(tmp_path: Path) -> None:
    save(peers.VQGAN, tmp_path / "tokenizer.safetensors")
    (tmp_path / "run.json").write_text("")
    with pytest.raises(BadRequestError, match=r"run\.json"):
        run_export(peers.VQGAN, tmp_path, "compvis")
    assert not (tmp_path / "out-compvis").exists()
