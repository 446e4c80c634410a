"""With the published networks, the metrics equal those of torch-fidelity and lpips on the same pictures.

The weights are searched in torch hub's folder (`TORCH_HOME`), into which `movq weights --fetch` downloads them. Without
them the tests are skipped.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import pytest
from PIL import Image
from skimage import data, transform
from torch_fidelity import calculate_metrics

from movq_cli.commands.evaluate import evaluate
from movq_cli.console import Console
from movq_cli.evaluation.extractors import Trunk, available_trunks
from movq_cli.evaluation.metrics import LPIPS
from movq_cli.evaluation.pretrained import WEIGHTS, Network, find_weights, is_available, read_tensors
from movq_cli.evaluation.request import EvaluationRequest

COUNT = 16
SIDE = 64


def requires(*networks: Network) -> pytest.MarkDecorator:
    """Skip a test whose weights are not on this machine."""
    missing = [WEIGHTS[name].file for name in networks if not is_available(name)]
    reason = f"{', '.join(missing)} is not in torch hub's folder: run `movq weights --fetch`"
    return pytest.mark.skipif(bool(missing), reason=reason)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Crops of photographs, and the same crops with fewer details and another brightness."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    photographs = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    for name in ("real", "fake"):
        (folder / name).mkdir()
    for number in range(COUNT):
        photograph = photographs[number % len(photographs)]
        top, left = (generator.integers(0, length - SIDE) for length in photograph.shape[:2])
        crop = photograph[top : top + SIDE, left : left + SIDE]
        coarse = transform.resize(transform.resize(crop, (16, 16), anti_aliasing=True), (SIDE, SIDE))
        fake = np.clip(coarse * 255 * generator.uniform(0.7, 1.1), 0, 255).astype(np.uint8)
        Image.fromarray(crop).save(folder / "real" / f"{number:03d}.png")
        Image.fromarray(fake).save(folder / "fake" / f"{number:03d}.png")
    return folder / "real", folder / "fake"


def measured(sets: tuple[Path, Path], folder: Path, *metrics: str) -> dict[str, Any]:
    """Return the result of `movq evaluate`."""
    out = folder / "result.json"
    request = EvaluationRequest(
        metrics=metrics,
        require_weights=True,
        copies=None,
        codebook=False,
        run=None,
        split="val",
        crop=None,
        strict=True,
        batch_size=16,
        weights=None,
        cache=folder / "cache",
        preset=None,
        device="cpu",
        gpus=None,
        out=out,
    )
    evaluate(str(sets[0]), str(sets[1]), request, arguments=[], console=Console(quiet=True))
    return dict(json.loads(out.read_text()))


@pytest.mark.slow
@requires("inception")
def test_fid_kid_precision_and_recall_are_torch_fidelitys(sets: tuple[Path, Path], tmp_path: Path) -> None:
    real, fake = sets
    theirs = calculate_metrics(
        input1=str(fake),
        input2=str(real),
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        fid=True,
        kid=True,
        kid_subset_size=COUNT,
        prc=True,
        cuda=False,
        cache=False,
        verbose=False,
    )
    ours = measured(sets, tmp_path, "fid", "kid", "prc")
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trunk", [pytest.param("alex", marks=requires("alex")), pytest.param("vgg", marks=requires("vgg"))]
)
def test_lpips_is_the_librarys(sets: tuple[Path, Path], tmp_path: Path, trunk: Trunk) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    # The library would download the classifier too, which it does not use.
    tensors = read_tensors(find_weights(trunk, download=False))
    for name, parameter in theirs.net.named_parameters():
        parameter.data.copy_(tensors[f"features.{name.split('.', 1)[1]}"])
    distances = []
    for path in sorted(sets[0].iterdir()):
        pair = [lpips.im2tensor(np.asarray(Image.open(folder / path.name))) for folder in sets]
        distances.append(theirs(*pair).item())
    ours = measured(sets, tmp_path, "lpips")
    key = LPIPS.result_keys[available_trunks(None).index(trunk)]
    assert ours[key] == pytest.approx(np.mean(distances), rel=1e-5)
