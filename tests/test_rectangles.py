"""Images that are not square go through both stages as real commands: 16 pixels high and 32 pixels wide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.evaluation import draw_weights
from movq_cli import api, checkpoints
from movq_cli.data import grids
from movq_cli.data.shards import PreparedSet
from movq_cli.runs import Run
from movq_cli.settings import Preset
from tests.conftest import TINY, draw_shapes, run_movq

SHORT = ["steps=2", "validate_every=2", "checkpoint_every=2"]


def write_preset(folder: Path, resolution: object, data: str = "data") -> Path:
    path = folder / "wide.yaml"
    vq = {
        **Preset.model_validate(TINY).vq.model_dump(mode="json"),
        "resolution": resolution,
        "initial_feature": "constant",
    }
    views = {"mirror": True, "scales": [1.25]}
    path.write_text(json.dumps({**TINY, "vq": vq, "views": views, "data": {"path": data, "crop": "random"}}))
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of images of 32 x 16 pixels and trained runs of both stages."""
    folder = tmp_path_factory.mktemp("wide")
    draw_shapes(folder / "pictures")
    size = ["--size", "16x32", "--upscale", "--workers", "1"]
    run_movq(folder, "prepare", folder / "pictures", "data", *size, "--val", "12")
    write_preset(folder, [16, 32])
    for command, section in (("train-vq", "train_vq"), ("train-prior", "train_prior")):
        run_movq(folder, command, "-p", "wide.yaml", *(f"-o{section}.{setting}" for setting in SHORT))
    return folder


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.mark.slow
def test_the_set_and_the_weight_files_have_height_and_width(wide: Path) -> None:
    images = PreparedSet.open(wide / "data")
    assert (images.manifest.size, images.manifest.square) == ((16, 32), False)
    assert (images.manifest.min_side, images.manifest.max_side) == (16, 32)
    assert images.split("train").pixels(0).shape == (16, 32, 3)
    run_movq(wide, "prepare", "--check", "data", "--workers", "1")
    tokenizer = checkpoints.load_tokenizer(Run(wide / "runs" / "wide-vq", "vq").weights)
    assert tokenizer.settings.resolution == (16, 32)
    assert tokenizer.state_dict()["decoder.initial_feature.constant"].shape[-2:] == (8, 16)
    prior = api.Prior.load(wide / "runs" / "wide-prior")
    assert prior.transformer.shape.size == (8, 16, 4)
    assert prior.sample(2, steps=2).shape == (2, 3, 16, 32)
    caches = list((wide / "runs" / "wide-vq").rglob("codes.npy"))
    assert sorted(np.load(path).shape for path in caches) == [(12, 8, 16, 4), (480, 8, 16, 4)]


@pytest.mark.slow
def test_samples_reconstructions_and_metrics_are_of_the_trained_size(wide: Path) -> None:
    run_movq(wide, "sample", "samples", "-n", "2", "--grid", "grid.png")
    assert {size_of(path) for path in (wide / "samples").rglob("*.png")} == {(32, 16)}
    grid, tiles = grids.read(wide / "grid.png")
    assert (grid.rows, grid.columns, tiles.shape) == (1, 2, (2, 16, 32, 3))
    for tile, path in zip(tiles, sorted((wide / "samples").rglob("*.png")), strict=True):
        assert np.array_equal(tile, np.asarray(Image.open(path).convert("RGB")))
    run_movq(wide, "reconstruct", "data", "same", "--split", "val")
    assert {size_of(path) for path in (wide / "same").rglob("*.png")} == {(32, 16)}
    done = run_movq(wide, "evaluate", "data", "same", "--psnr", "--crop", "16x32", "--json")
    result = json.loads(done.stdout)
    assert result["protocol"]["real"]["crop"] == {"height": 16, "width": 32, "filter": "lanczos"}
    assert result["psnr"] > 0
    assert "resized" not in done.stderr
    assert "several sizes" not in done.stderr


@pytest.mark.slow
def test_fid_during_training_is_that_of_evaluate_and_its_features_are_computed_once(wide: Path, tmp_path: Path) -> None:
    weights: list[str | Path] = ["--weights", tmp_path / "weights"]
    draw_weights(tmp_path / "weights")
    options = [*SHORT, "evaluate_every=2", "evaluate_images=12", "ema_decay=0"]
    train: list[str | Path] = ["train-vq", "-p", wide / "wide.yaml", "--data", wide / "data", *weights]
    train += [f"-otrain_vq.{option}" for option in options]
    assert "features of real" in run_movq(tmp_path, *train, "--run", "one").stderr
    assert "features of real" not in run_movq(tmp_path, *train, "--run", "two").stderr
    logs = [Run(tmp_path / name, "vq").log.read_text().splitlines() for name in ("one", "two")]
    first, second = (json.loads(lines[-1])["validation"]["rfid"] for lines in logs)
    assert first == second
    run_movq(tmp_path, "reconstruct", wide / "data", "same", "--split", "val", "--run", "one")
    compared: list[str | Path] = [wide / "data", "same", "--fid", "--split", "val", "--crop", "16x32", *weights]
    assert json.loads(run_movq(tmp_path, "evaluate", *compared, "--json").stdout)["fid"] == pytest.approx(first)


@pytest.mark.slow
def test_an_exported_tokenizer_of_rectangles_is_imported_again(wide: Path, tmp_path: Path) -> None:
    changes = ["vq.initial_feature=quantized", "vq.modulation=null", "vq.chunks=1"]
    changes += [f"train_vq.{setting}" for setting in SHORT]
    options = [f"-o{change}" for change in changes]
    run_movq(tmp_path, "train-vq", "-p", wide / "wide.yaml", "--data", wide / "data", "--run", "vq", *options)
    images = torch.rand(2, 3, 16, 32) * 2 - 1
    codes = api.Tokenizer.load(tmp_path / "vq").encode(images)
    for form in ("compvis", "diffusers"):
        run_movq(tmp_path, "export", "vq", form, "--to", form)
        weights = tmp_path / form / "model.ckpt" if form == "compvis" else tmp_path / form
        run_movq(tmp_path, "import", weights, f"{form}-again", "--resolution", "16x32")
        again = api.Tokenizer.load(tmp_path / f"{form}-again")
        assert again.settings.resolution == (16, 32)
        assert torch.equal(again.encode(images), codes)


@pytest.mark.slow
def test_a_picture_is_cropped_to_the_size_of_the_prior_before_codes_are_filled_in(wide: Path) -> None:
    pictures = wide / "pictures" / "dot"
    run_movq(wide, "reconstruct", pictures, "filled", "--mask-ratio", "0.5", "--prior", "runs/wide-prior")
    assert {size_of(path) for path in (wide / "filled").rglob("*.png")} == {(32, 16)}


@pytest.mark.slow
def test_a_set_of_other_shapes_is_refused_with_both_sizes_and_both_remedies_work(wide: Path, tmp_path: Path) -> None:
    run_movq(wide, "prepare", wide / "pictures", tmp_path / "data", "--size", "16", "--workers", "1", "--val", "12")
    preset = write_preset(tmp_path, [16, 32], str(tmp_path / "data"))
    error = run_movq(tmp_path, "train-vq", "-p", preset, code=2).stderr.splitlines()[-1]
    assert "has images that are only 16 pixels high or 20 pixels wide" in error
    assert "smaller than the preset's 16x32 pixels (height x width). Prepare it with --size 16x32" in error
    assert error.endswith("or train at their size with -o 'vq.resolution=[16,20]'.")
    short = [f"-otrain_vq.{setting}" for setting in SHORT]
    run_movq(tmp_path, "train-vq", "-p", preset, "-o", "vq.resolution=[16,20]", *short)
    run_movq(tmp_path, "train-vq", "-p", preset, "--data", wide / "data", "--run", "again", *short)


@pytest.mark.slow
def test_a_missing_set_of_rectangles_is_made_by_the_command_in_the_hint(wide: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, [8, 16], "other")
    error = run_movq(tmp_path, "train-vq", "-p", preset, "-o", "vq.attention_resolutions=[]", code=2).stderr
    assert "Prepare it (movq prepare IMAGES other --size 8x16)" in error
    run_movq(tmp_path, "prepare", wide / "pictures", "other", "--size", "8x16", "--workers", "1")
    assert PreparedSet.open(tmp_path / "other").manifest.size == (8, 16)
