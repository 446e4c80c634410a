"""One class is all that a new metric takes, and everything that is known of a metric comes from its class."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movq_cli.errors import BadRequestError
from movq_cli.evaluation import metrics
from movq_cli.evaluation.metric import Metric, Needs
from movq_cli.evaluation.metrics import FID, KID, REGISTRY, PrecisionRecall, PrecisionRecallVGG

PACKAGE = Path(metrics.__file__).parents[1]

PLUGIN = '''
import sys
from pathlib import Path

import torch
from torch import nn

from movq_cli.evaluation import extractors
from movq_cli.evaluation.metric import Measurement, PixelMetric, SetMetric
from movq_cli.evaluation.metrics import register


@register
class MeanError(PixelMetric):
    """Mean absolute error of the pixels."""

    key = "mae"
    option = "--mae"
    help = "Mean absolute error of pairs of the same name, 0 to 255; lower is better."
    result_keys = ("mae",)
    variant = "all pixels and channels in [0,255], mean over images"
    smallest_side = 8
    minimum_images = 2
    decimals = 1

    def score(self, real, fake):
        return (real.double() - fake.double()).abs().mean(dim=(1, 2, 3))


@register
class MeanDistance(SetMetric):
    """Distance between the mean features of both sets."""

    key = "mean_distance"
    option = "--mean-distance"
    help = "Distance between the mean Inception features; lower is better."
    result_keys = ("mean_distance",)
    variant = "Inception pool features, Euclidean"
    minimum_images = 3
    decimals = 3

    def compute(self, inputs):
        distance = (inputs.real.double().mean(dim=0) - inputs.fake.double().mean(dim=0)).norm().item()
        return Measurement({"mean_distance": distance})


class Projection(nn.Module):
    """Stands in for Inception: the mean color of an image."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5, bias=False)

    def forward(self, images):
        return (images.float().mean(dim=(2, 3)),)


extractors.load_inception = lambda folder, _: extractors.Inception(
    Projection(), "projection", 3, folder / "weights-inception-2015-12-05-6726825d.pth"
)

from movq_cli import app

app.main()
'''


def write_images(folder: Path, images: np.ndarray) -> None:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")


@pytest.fixture
def images(tmp_path: Path) -> np.ndarray:
    """Two sets of four images, uint8 [2, 4, 16, 16, 3], which are also the folders `real` and `fake`."""
    drawn = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3), dtype=np.uint8)
    for name, part in zip(("real", "fake"), drawn, strict=True):
        write_images(tmp_path / name, part)
        write_images(tmp_path / f"one {name}", part[:1])
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"stub")
    return drawn


def run(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `movq` with both toy metrics registered."""
    (folder / "plugin.py").write_text(PLUGIN)
    done = subprocess.run(
        [sys.executable, "plugin.py", *arguments],
        cwd=folder,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "TORCH_HOME": str(folder / "torch")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.processes
def test_a_registered_class_is_a_metric_of_the_command(tmp_path: Path, images: np.ndarray) -> None:
    sets = ["real", "fake", "--weights", "weights", "--device", "cpu"]
    result = json.loads(run(tmp_path, "evaluate", *sets, "--mae", "--mean-distance", "--json").stdout)
    real, fake = images.astype(float)
    assert result["mae"] == pytest.approx(np.abs(real - fake).mean())
    difference = real.mean(axis=(0, 1, 2)) - fake.mean(axis=(0, 1, 2))
    assert result["mean_distance"] == pytest.approx(np.linalg.norm(difference), rel=1e-5)
    assert set(result) == {"mae", "mean_distance", "protocol"}
    assert result["protocol"]["variants"] == {
        "mae": "all pixels and channels in [0,255], mean over images",
        "mean_distance": "Inception pool features, Euclidean",
    }
    assert result["protocol"]["pairs"]["averaged"] == {"mae": 4}


@pytest.mark.processes
def test_it_is_in_the_help_the_tables_and_the_default_metrics(tmp_path: Path, images: np.ndarray) -> None:
    shown = run(tmp_path, "evaluate", "--help").stdout
    assert "--mae" in shown
    assert "--mean-distance" in shown
    sets = ["real", "fake", "--weights", "weights", "--device", "cpu"]
    everything = json.loads(run(tmp_path, "evaluate", *sets, "--json", "--out", "result.json").stdout)
    assert {"mae", "mean_distance", "psnr", "fid", "kid"} <= set(everything)
    header, _, row = run(tmp_path, "evaluate", "--table", "result.json").stdout.splitlines()
    cells = {name.strip(): cell.strip() for name, cell in zip(header.split("|"), row.split("|"), strict=True)}
    assert cells["mae"] == f"{everything['mae']:.1f}"
    assert cells["mean_distance"] == f"{everything['mean_distance']:.3f}"


@pytest.mark.processes
def test_its_smallest_number_of_images_is_required(tmp_path: Path, images: np.ndarray) -> None:
    sets = ["one real", "one fake", "--weights", "weights", "--device", "cpu"]
    done = run(tmp_path, "evaluate", *sets, "--mean-distance", code=2)
    assert "mean_distance needs at least 3 images in each set, not 1" in done.stderr
    done = run(tmp_path, "evaluate", *sets, "--json")
    assert "left out mae: mae needs at least 2 pairs, not 1" in done.stderr
    assert "left out mean_distance: mean_distance needs at least 3 images" in done.stderr
    assert not {"mae", "mean_distance"} & set(json.loads(done.stdout))


@pytest.mark.processes
def test_its_smallest_number_of_images_counts_those_that_can_be_read(tmp_path: Path, images: np.ndarray) -> None:
    for number in (1, 2):
        (tmp_path / "fake" / f"{number}.png").write_bytes(b"corrupt")
    sets = ["real", "fake", "--weights", "weights", "--device", "cpu"]
    done = run(tmp_path, "evaluate", *sets, "--mean-distance", code=2)
    assert "mean_distance needs at least 3 images in each set, not 2" in done.stderr


@pytest.mark.processes
def test_its_weights_are_required(tmp_path: Path, images: np.ndarray) -> None:
    closed = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in closed.items():
            patch.setenv(name, value)
        done = run(tmp_path, "evaluate", "real", "fake", "--mean-distance", "--device", "cpu", code=2)
    assert "no weights weights-inception" in done.stderr


def test_no_other_file_of_the_command_names_a_metric() -> None:
    """A key elsewhere would be a second file that a new metric touches."""
    keys = {key for metric in REGISTRY.values() for key in (metric.key, *metric.result_keys)}
    # The protocol also has the floating-point precision and the lpips library; --copies is an option of its own kind.
    keys -= {"precision", "lpips", "copies"}
    command = [PACKAGE / "cli" / "evaluate.py", *PACKAGE.glob("commands/evaluat*.py"), *PACKAGE.glob("evaluation/*.py")]
    for path in {*command, PACKAGE / "commands" / "statistics.py"} - {PACKAGE / "evaluation" / "metrics.py"}:
        constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        assert not keys.intersection(value for value in constants if isinstance(value, str)), path


def test_the_registry_loads_without_torch() -> None:
    code = "import sys, movq_cli.evaluation.metrics\nassert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("metric", REGISTRY.values(), ids=REGISTRY)
def test_every_metric_says_what_a_report_needs(metric: type[Metric]) -> None:
    assert metric.variant
    assert metric.result_keys
    assert all(metrics.with_result_key(key) is metric for key in metric.result_keys)
    assert (metric.option is None) == (metric.help == "")
    assert metric.needs is Needs.PAIRS or metric.network is not None


def test_names_that_another_metric_has_are_refused() -> None:
    before = dict(REGISTRY)
    for names in ({"key": "fid"}, {"option": "--fid"}, {"result_keys": ("recall",)}):
        body = {"key": "new", "option": "--new", "result_keys": ("new",), "help": "", "variant": ""} | names
        with pytest.raises(ValueError, match="has a name of"):
            metrics.register(type("New", (KID,), body))
    assert before == REGISTRY


def test_constants_stand_in_variants_as_they_are_used() -> None:
    assert f"k = {metrics.NEIGHBOURS}" in PrecisionRecall.variant
    assert f"k = {metrics.NEIGHBOURS}" in PrecisionRecallVGG.variant
    assert PrecisionRecall.minimum_images == PrecisionRecallVGG.minimum_images == 4
    assert f"{KID.subsets} subsets of at most {KID.subset_size:,}" in KID.variant
    assert (PrecisionRecall.references, PrecisionRecallVGG.references) == (10_000, None)


def test_too_few_images_are_refused_with_the_number() -> None:
    for metric, smallest in ((KID, 2), (FID, 2), (PrecisionRecall, 4), (metrics.InceptionScore, 1)):
        metric.require_images(smallest)
        with pytest.raises(BadRequestError, match=f"{metric.key} needs at least {smallest} images in each set"):
            metric.require_images(smallest - 1)


def test_the_fid_of_reconstructions_is_compared_with_rfid() -> None:
    assert FID.target_key("fid", reconstructed=True) == "rfid"
    assert FID.target_key("fid", reconstructed=False) == "fid"
    assert KID.target_key("kid", reconstructed=True) == "kid"


def test_pairs_come_first_and_no_key_requests_every_metric_with_a_flag_apart_from_variants() -> None:
    assert [metric.key for metric in metrics.requested(("fid", "psnr"))] == ["psnr", "fid"]
    assert [metric.key for metric in metrics.requested(("isc_ordered",))] == ["isc_ordered"]
    assert {metric.key for metric in metrics.requested()} == REGISTRY.keys() - {"copies", "isc_ordered"}
