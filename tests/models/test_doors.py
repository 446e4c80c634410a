"""What a contributor registers works in the real commands: a quantizer, a mode of the prior, a decoding order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from movq_cli import app, checkpoints
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.models.masked_prior import ORDERS
from movq_cli.models.priors import PRIORS
from movq_cli.models.quantizers import QUANTIZERS
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings
from tests.conftest import write_tiny
from tests.models.toys import IndependentPrior, SignQuantizer, raster


def movq(*arguments: object) -> None:
    """Run a command in this process, in which the toys are registered."""
    app.app([*map(str, arguments), "--quiet", "--device", "cpu"], standalone_mode=False)


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def pictures(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("*.png"))]


@pytest.mark.slow
@pytest.mark.usefixtures("prepared")
def test_a_quantizer_without_losses_trains_and_reconstructs(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "sign", SignQuantizer)
    run = tmp_path / "run"
    movq("train-vq", "--preset", write_tiny(tmp_path), "-o", "vq.quantizer=sign", "--run", run)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    training = [line["training"] for line in log if "training" in line]
    assert len(training) == 10
    assert not {"codebook", "commitment"} & training[-1].keys()
    movq("reconstruct", shapes / "dot", tmp_path / "out", "--run", run, "--codes", tmp_path / "codes")
    assert len(pictures(tmp_path / "out")) == 20
    assert len(list((tmp_path / "codes").glob("*.npy"))) == 20
    model = checkpoints.load_tokenizer(run / "tokenizer.safetensors")
    assert isinstance(model.quantize, SignQuantizer)
    codes = model.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert torch.equal(model.quantize.encode(model.quantize.decode(codes)), codes)


def test_a_mode_of_the_prior_trains_and_samples(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRIORS, "independent", IndependentPrior)
    monkeypatch.chdir(trained)
    movq("train-prior", "--preset", "tiny.yaml", "--mode", "independent", "-o", "train_prior.precision=float32")
    run = trained / "runs" / "tiny-independent"
    movq("sample", "samples", "--run", run, "--n", 3)
    assert len(set(pictures(trained / "samples"))) == 3
    settings = manifest_of(trained / "samples")["settings"]
    assert settings["mode"] == "independent"
    assert not {*IndependentPrior.unused_sample_settings, "revealed"} & settings.keys()
    with pytest.raises(BadRequestError, match=r"mode independent.*draws all codes at once.*Leave --steps out"):
        movq("sample", "others", "--run", run, "--n", 3, "--steps", 2)
    with pytest.raises(BadRequestError, match="cannot fill in hidden codes"):
        movq("reconstruct", "pictures/dot", "filled", "--mask-ratio", 0.5, "--prior", run)


def test_a_decoding_order_samples(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[Tensor] = []

    def recorded(
        log_probability: Tensor, uniforms: Tensor, step: int, settings: SampleSettings, shape: CodeShape
    ) -> Tensor:
        scores = raster(log_probability, uniforms, step, settings, shape)
        hidden.append(scores)
        return scores

    monkeypatch.setitem(ORDERS, "raster", recorded)
    monkeypatch.chdir(trained)
    movq("train-prior", "--preset", "tiny.yaml", "-o", "sample.order=raster", "--run", "raster")
    hidden.clear()
    movq("sample", "samples", "--run", "raster", "--n", 2)
    assert len(hidden) == 4  # decoding steps of the tiny preset
    assert manifest_of(trained / "samples")["settings"]["order"] == "raster"
    assert len(set(pictures(trained / "samples"))) == 2


def test_the_order_decides_which_codes_are_known_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from movq_cli.models import priors

    monkeypatch.setitem(ORDERS, "raster", raster)
    shape = CodeShape(height=2, width=3, chunks=2, codebook_size=9)
    model = priors.build(PriorSettings(layers=1, heads=2, width=16, hidden=16), shape).eval()
    inputs: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    model.decode([0, 1], None, SampleSettings(steps=4, order="raster"))
    for codes in inputs[1:]:
        unknown = (codes == model.unknown).flatten(1)
        count = int(unknown[0].sum())
        assert 0 < count < shape.codes
        assert unknown[:, shape.codes - count :].all()
        assert not unknown[:, : shape.codes - count].any()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("prior.mode=nosuch", r"unknown prior\.mode 'nosuch'.*mask, auto, depth"),
        ("prior.mode=depth", "mode=depth needs at least 3 layers, 2 of them over the chunks, not 2"),
        ("sample.order=nosuch", r"unknown sample\.order 'nosuch'.*confidence"),
    ],
)
def test_unknown_names_and_too_few_layers_are_refused(
    setting: str, words: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    with pytest.raises(BadRequestError, match=words):
        movq("train-prior", "--preset", "tiny.yaml", "-o", setting, "--run", "other")


def test_an_unknown_quantizer_is_refused_by_the_command(prepared: PreparedSet, tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"unknown quantizer 'nosuch'.*vq"):
        movq("train-vq", "--preset", write_tiny(tmp_path), "-o", "vq.quantizer=nosuch", "--run", tmp_path / "run")
