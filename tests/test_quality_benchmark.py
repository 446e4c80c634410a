"""The benchmark of the techniques: it makes its rows by real commands, resumes, and says what was not measured."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import photos, quality
from benchmarks.photos import Bench
from movq_cli import presets
from movq_cli.data import pixels
from movq_cli.evaluation import perturbed
from movq_cli.evaluation.distributions import FeatureStatistics, frechet_distance
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import SINGLE_PROCESS
from movq_cli.settings import Preset
from tests.conftest import run_movq

CPU = torch.device("cpu")


class Colors(nn.Module):
    """The smallest feature extractor: the mean color of an image."""

    width = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.double().mean((2, 3))


def evaluator_of(images: Tensor) -> FIDEvaluator:
    statistics = FeatureStatistics(3)
    statistics.update(Colors()(images))
    return FIDEvaluator(Colors(), (statistics.mean, statistics.covariance), CPU, SINGLE_PROCESS)  # type: ignore[arg-type]


def test_the_perturbed_fid_is_the_rfid_without_replaced_codes_and_repeats_by_its_seed(tiny: Preset) -> None:
    torch.manual_seed(0)
    model = Tokenizer(tiny.vq).eval()
    nn.init.normal_(model.quantize.get_parameter("embedding.weight"), std=3.0)
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8)
    evaluator = evaluator_of(images)

    def measured(shares: tuple[float, ...], seed: int = 0) -> dict[float, float]:
        return perturbed.perturbed_fid(model, images.split(5), evaluator, shares, seed)

    rebuilt = pixels.to_bytes(model.decode(model.encode(pixels.to_signed(images))))
    own = FeatureStatistics(3)
    own.update(Colors()(rebuilt))
    fids = measured((0.0, 1.0))
    assert fids[0.0] == pytest.approx(frechet_distance(*evaluator.real, own.mean, own.covariance))
    assert measured((1.0,))[1.0] == fids[1.0]
    # The codebook of the tiny preset has 16 entries, so that the only neighbor of a code is the code itself.
    assert fids[1.0] == pytest.approx(fids[0.0])


def test_tokenizers_come_before_priors_and_seeds_of_all_rows_before_the_next_seed() -> None:
    found = list(quality.jobs(["default", "fsq"], [0, 1], with_prior=True))
    assert [(job.stage, job.row, job.seed) for job in found] == [
        (stage, row, seed) for stage in ("tokenizer", "prior") for seed in (0, 1) for row in ("default", "fsq")
    ]
    assert {job.stage for job in quality.jobs(["default"], [0], with_prior=False)} == {"tokenizer"}


def test_all_rows_but_those_of_the_rotation_trick_have_the_gradient_of_the_paper() -> None:
    for preset in ("photos-32", "ffhq"):
        for row in quality.ROWS:
            job = quality.Job("tokenizer", row, 0)
            gradient = presets.load(preset, quality.changes_of(job)).train_vq.quantizer_gradient
            assert gradient == ("rotation" if "rotation" in row or row == "combined" else "straight-through"), row


def test_the_table_has_means_and_deviations_and_says_what_is_not_measured() -> None:
    seeds = {f"tokenizer-{seed}": {"rfid": 10.0 + seed, "parameters": 7} for seed in range(3)}
    better = {f"tokenizer-{seed}": {"rfid": 2.0 + seed} for seed in range(3)}
    prior = {"prior-0": {"fid": 50.0}}
    rows = {"default": {**seeds, **prior}, "rotation": better, "fsq": {"tokenizer-0": {"rfid": 3.0}}}
    columns = [list(column.cells) for column in quality.table(rows, ["default", "rotation", "fsq", "simvq"]).columns]
    assert columns[0] == ["default", "rotation", "fsq", "simvq"]
    assert columns[1] == ["11.00 ± 1.00 (3)", "3.00 ± 1.00 (3)", "3.00 (1)", "not measured"]
    assert columns[2] == ["not measured"] * 4
    assert columns[6] == ["50.0 (1)", *["not measured"] * 3]
    assert columns[7] == ["", "yes", "", ""]


@pytest.mark.slow
def test_a_row_is_measured_once_and_again_if_its_settings_change(
    shapes: Path, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "fids", lambda *_: {0.0: 1.5, 0.3: 2.5})  # Inception's weights are not here.
    monkeypatch.setattr(photos, "movq", lambda *words: json.loads(run_movq(tmp_path, *words, "--json").stdout))
    arguments = [shapes, "--preset", tiny_yaml, "--held-out", "12", "--work", tmp_path / "w", "--out", tmp_path]
    options = ["--rows", "default", "--seeds", "1", "--without-prior", "-o", "train_vq.steps=5", "--device", "cpu"]

    def measured() -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["quality", *map(str, [*arguments, *options])])
        quality.main()
        rows = json.loads((tmp_path / f"quality-tiny-{shapes.stem}.json").read_text())["rows"]
        assert list(rows) == ["default"]
        results: dict[str, Any] = rows["default"]["tokenizer-1"]
        return results

    first = measured()
    assert (first["rfid"], first["perturbed_rfid"], first["step"]) == (1.5, 2.5, 5)
    assert f"default-1-{first['digest']}" in {path.name for path in (tmp_path / "w").iterdir()}
    monkeypatch.setattr(photos, "movq", lambda *_: pytest.fail("a command was run for a recorded row"))
    assert measured() == first
    bench = Bench(str(shapes), str(tiny_yaml), ("train_vq.steps=4",), 12, tmp_path / "w", ())
    path = tmp_path / f"quality-tiny-{shapes.stem}.json"
    assert len(list(quality.unmeasured(bench, path, ["default"], [1], with_prior=False))) == 1


@pytest.mark.slow
def test_rows_that_differ_in_their_samples_alone_share_a_prior(
    shapes: Path, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def movq(command: str, *words: str | Path) -> Any:
        if command == "evaluate":  # Inception's weights are not here.
            return {"fid": float(len(json.loads((Path(words[1]) / "manifest.json").read_text())["images"]))}
        return json.loads(run_movq(tmp_path, command, *words, "--json").stdout)

    monkeypatch.setattr(quality, "fids", lambda *_: {0.0: 1.5, 0.3: 2.5})
    monkeypatch.setattr(photos, "movq", movq)
    arguments = [shapes, "--preset", tiny_yaml, "--held-out", "12", "--work", tmp_path / "w", "--out", tmp_path]
    steps = ["-o", "train_vq.steps=2", "-o", "train_prior.steps=2", "-o", "sample.steps=3"]
    rows = ["--rows", "default", "halton", "guidance", "dropout", "--seeds", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["quality", *map(str, [*arguments, *steps, *rows])])
    quality.main()

    measured = json.loads((tmp_path / f"quality-tiny-{shapes.stem}.json").read_text())["rows"]
    assert {row: measured[row]["prior-0"]["fid"] for row in measured} == dict.fromkeys(rows[1:5], 12.0)
    priors = {row: measured[row]["prior-0"]["row"] for row in measured}
    assert priors["default"] == priors["halton"] == priors["guidance"] != priors["dropout"]
    manifests = (json.loads(path.read_text()) for path in (tmp_path / "w").glob("samples-*/manifest.json"))
    settings = [manifest["settings"] for manifest in manifests]
    drawn = sorted([made.get("order", "confidence"), made["guidance"], made["steps"]] for made in settings)
    assert drawn == [["confidence", 0.0, 3], ["confidence", 0.0, 3], ["confidence", 1.0, 3], ["halton", 0.0, 3]]

    # On another machine with the results alone, the tokenizer of a new row is trained again.
    shutil.rmtree(tmp_path / "w")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rows", "random"])
    quality.main()
    rows = json.loads((tmp_path / f"quality-tiny-{shapes.stem}.json").read_text())["rows"]
    assert rows["random"]["prior-0"]["fid"] == 12.0
    assert {row: rows[row] for row in measured} == measured
