"""`movq evaluate` gives the values of reference implementations, once, with all that a reader must know of them."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lpips as lpips_library
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from movq_cli import Tokenizer, digests
from movq_cli.commands.evaluate import codebook, evaluate
from movq_cli.commands.statistics import statistics
from movq_cli.console import Console
from movq_cli.data import grids
from movq_cli.data.sample_files import SampleManifest
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.evaluation import distributions, extractors
from movq_cli.evaluation.comparison import Comparison
from movq_cli.evaluation.metric import MetricValues
from movq_cli.evaluation.metrics import KID
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.evaluation.request import EvaluationRequest
from movq_cli.evaluation.selection import select_metrics
from movq_cli.evaluation.sides import Sides
from movq_cli.ranks import Ranks
from tests.conftest import Movq, on_ranks

SIDE = 32
Pixels = dict[str, np.ndarray]
WIDTH = 64  # of the stand-in for Inception: eigenvalues of 2,048 take seconds


pytestmark = pytest.mark.usefixtures("offline")


class Projection(nn.Module):
    """A stand-in for Inception: random projections of small pictures, and what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 8 * 8, WIDTH, generator=generator) / 14)
        self.fc = nn.Linear(WIDTH, 20, bias=False)
        nn.init.normal_(self.fc.weight, generator=generator)
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> tuple[Tensor]:
        self.seen.extend(images.shape[0] * [images.shape[2]])
        assert images.dtype == torch.uint8
        return (nn.functional.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1) @ self.weight,)


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, list[int]]:
    """A folder that seems to hold Inception's weights, and in its place a small network whose sights are listed."""
    folder = tmp_path / "weights"
    folder.mkdir(exist_ok=True)
    path = folder / WEIGHTS["inception"].file
    path.write_bytes(b"stub")
    network = Projection()
    monkeypatch.setattr(extractors, "INCEPTION_WIDTH", WIDTH)
    monkeypatch.setattr(
        extractors, "load_inception", lambda *_: extractors.Inception(network, "projection", WIDTH, path)
    )
    return folder, network.seen


def write_images(
    folder: Path, names: Sequence[str], seed: int = 0, side: int = SIDE, base: Pixels | None = None, noise: int = 0
) -> Pixels:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    pixels = {}
    for name in names:
        image = random.integers(0, 256, (side, side, 3)) if base is None else base[name.rpartition(".")[0]]
        image = np.clip(image + random.integers(-noise, noise + 1, image.shape), 0, 255).astype(np.uint8)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        pixels[name.rpartition(".")[0]] = image
    return pixels


def numbered(count: int) -> list[str]:
    return [f"{i:03d}.png" for i in range(count)]


PLAIN = EvaluationRequest(
    metrics=(),
    require_weights=False,
    copies=None,
    codebook=False,
    run=None,
    split="val",
    crop=None,
    strict=False,
    batch_size=4,
    weights=None,
    cache=Path(),
    preset=None,
    device="cpu",
    gpus=None,
    out=None,
)


def run(
    first: Path | str,
    second: Path,
    *metrics: str,
    capsys: pytest.CaptureFixture[str],
    as_json: bool = True,
    **options: Any,
) -> tuple[Any, str]:
    """The printed result and the lines on stderr."""
    cache = Path(second).parent / "cache"
    request = dataclasses.replace(
        PLAIN, metrics=metrics, **{"require_weights": bool(metrics), "cache": cache, **options}
    )
    capsys.readouterr()
    evaluate(str(first), str(second), request, arguments=[], console=Console(as_json=as_json, quiet=True))
    printed, said = capsys.readouterr()
    return (json.loads(printed) if as_json else printed), said


def reconstructions(tmp_path: Path, count: int = 5) -> tuple[Pixels, Pixels]:
    originals = write_images(tmp_path / "real", numbered(count))
    fakes = write_images(tmp_path / "fake", numbered(count), seed=1, base=originals, noise=30)
    return originals, fakes


def scikit_means(originals: Pixels, fakes: Pixels, names: Iterable[str]) -> tuple[Any, Any]:
    psnr, ssim = [], []
    for name in names:
        a, b = originals[name] / 255, fakes[name] / 255
        psnr.append(peak_signal_noise_ratio(a, b, data_range=1.0))
        ssim.append(structural_similarity(a, b, win_size=11, channel_axis=-1, data_range=1.0))
    return pytest.approx(np.mean(psnr)), pytest.approx(np.mean(ssim))


def test_psnr_and_ssim_of_folders_are_scikit_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    originals, fakes = reconstructions(tmp_path)
    out = tmp_path / "deep" / "result.json"
    result, said = run(tmp_path / "real", tmp_path / "fake", "psnr", "ssim", capsys=capsys, out=out)
    assert (result["psnr"], result["ssim"]) == scikit_means(originals, fakes, originals)
    assert set(result) == {"psnr", "ssim", "protocol"}
    assert json.loads(out.read_text()).items() >= result.items()
    protocol = result["protocol"]
    assert protocol["pairs"]["averaged"] == {"psnr": 5, "ssim": 5}
    assert protocol["real"]["sizes"] == {"32x32": 5}
    assert "11x11" in protocol["variants"]["ssim"]
    assert {"movq", "torch", "torch-fidelity", "lpips"} <= set(protocol["versions"])
    assert said == ""


def test_without_json_the_figures_are_a_table_with_their_variants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reconstructions(tmp_path)
    printed, _ = run(tmp_path / "real", tmp_path / "fake", "psnr", capsys=capsys, as_json=False)
    header, row = printed.splitlines()
    assert header.split("\t") == ["metric", "value", "variant"]
    assert row.startswith("psnr\t")
    assert "RGB in [0,1]" in row


def test_pairs_match_by_name_through_folders_archives_and_suffixes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    originals = write_images(tmp_path / "real", ["a/1.png", "a/2.png", "b/1.png"])
    fakes = write_images(
        tmp_path / "fake", ["a/1.bmp", "b/1.bmp", "c.bmp"], base=originals | {"c": originals["a/1"]}, noise=9
    )
    archive = tmp_path / "fake.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "fake").rglob("*.bmp"):
            file.write(path, path.relative_to(tmp_path / "fake"))
    result, said = run(tmp_path / "real", archive, "psnr", capsys=capsys)
    assert result["psnr"] == scikit_means(originals, fakes, ["a/1", "b/1"])[0]
    assert result["protocol"]["pairs"]["without_partner"] == {"real": 1, "fake": 1}
    assert "1 of the real images have no partner: a/2.png" in said
    assert "1 of the fake images have no partner: c.bmp" in said


def test_no_pair_at_all_is_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "real", ["a.png"])
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "b.png").write_bytes(b"never decoded")
    with pytest.raises(BadRequestError, match=r"no image.*partner"):
        run(tmp_path / "real", tmp_path / "fake", "psnr", capsys=capsys)


def test_a_corrupt_image_is_named_once_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    originals, fakes = reconstructions(tmp_path)
    whole = (tmp_path / "fake" / "002.png").read_bytes()
    (tmp_path / "fake" / "002.png").write_bytes(whole[: len(whole) // 2])
    result, said = run(tmp_path / "real", tmp_path / "fake", "psnr", "fid", capsys=capsys, weights=inception[0])
    assert result["psnr"] == scikit_means(originals, fakes, ["000", "001", "003", "004"])[0]
    assert result["protocol"]["fake"]["unreadable"] == ["002.png"]
    assert said.count("002.png") == 1


def test_pairs_of_unequal_sizes_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    originals, fakes = reconstructions(tmp_path)
    write_images(tmp_path / "fake", ["001.png"], side=40)
    result, said = run(tmp_path / "real", tmp_path / "fake", "psnr", capsys=capsys)
    assert result["psnr"] == scikit_means(originals, fakes, ["000", "002", "003", "004"])[0]
    assert result["protocol"]["pairs"]["of_unequal_sizes"] == 1
    assert "1 pairs of unequal sizes: 001.png" in said
    assert "several sizes" in said


def test_identical_images_do_not_make_the_mean_infinite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    originals, fakes = reconstructions(tmp_path)
    Image.fromarray(originals["003"]).save(tmp_path / "fake" / "003.png")
    result, said = run(tmp_path / "real", tmp_path / "fake", "psnr", "ssim", capsys=capsys)
    assert result["psnr"] == scikit_means(originals, fakes, ["000", "001", "002", "004"])[0]
    assert result["protocol"]["pairs"]["identical"] == 1
    assert "1 pairs are identical" in said
    same, said = run(tmp_path / "real", tmp_path / "real", "psnr", "ssim", capsys=capsys)
    assert same["psnr"] is None
    assert same["ssim"] == pytest.approx(1)
    assert "both sides are the same images" in said


def test_images_too_small_for_a_metric_are_an_error_only_if_it_was_requested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "real", numbered(2), side=8)
    write_images(tmp_path / "fake", numbered(2), side=8, seed=1)
    with pytest.raises(BadRequestError, match=r"ssim needs.*11 pixels"):
        run(tmp_path / "real", tmp_path / "fake", "ssim", capsys=capsys)
    result, said = run(tmp_path / "real", tmp_path / "fake", capsys=capsys)
    assert set(result) == {"psnr", "protocol"}
    assert "left out ssim" in said


def test_without_options_all_possible_metrics_are_computed_and_the_others_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    reconstructions(tmp_path)
    result, said = run(tmp_path / "real", tmp_path / "fake", capsys=capsys)
    assert set(result) == {"psnr", "ssim", "protocol"}
    assert "left out fid, isc, kid, prc: no weights weights-inception-2015-12-05-6726825d.pth" in said
    assert "left out lpips: no weights alexnet-owt-7be5be79.pth" in said
    write_images(tmp_path / "samples", ["x.png"])
    with pytest.raises(BadRequestError, match=r"no metric can be computed.*partner.*weights"):
        run(tmp_path / "real", tmp_path / "samples", capsys=capsys)


@pytest.mark.parametrize(("metric", "file"), [("fid", "weights-inception"), ("lpips", "alexnet-owt")])
def test_missing_weights_of_a_requested_metric_end_the_command_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str, file: str
) -> None:
    reconstructions(tmp_path)
    with pytest.raises(BadRequestError, match=rf"no weights {file}.*downloading.*--weights"):
        run(tmp_path / "real", tmp_path / "fake", metric, capsys=capsys)


def test_the_first_set_is_real_and_the_second_fake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    folder, _ = inception
    originals = write_images(tmp_path / "real", numbered(40))
    # A collapsed generator: near one real image.
    one = {f"{i:03d}": originals["000"] for i in range(40)}
    write_images(tmp_path / "fake", numbered(40), seed=1, base=one, noise=2)
    result, _ = run(tmp_path / "real", tmp_path / "fake", "prc", "isc", capsys=capsys, weights=folder)
    assert result["precision"] > 0.9
    assert result["recall"] < 0.1
    swapped, _ = run(tmp_path / "fake", tmp_path / "real", "prc", "isc", capsys=capsys, weights=folder)
    assert swapped["precision"] == pytest.approx(result["recall"])
    assert swapped["recall"] == pytest.approx(result["precision"])
    # The score is the second set's: many images are more diverse than one.
    assert swapped["isc"] > result["isc"]


def test_inception_score_looks_at_the_second_set_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    folder, seen = inception
    reconstructions(tmp_path)
    run(tmp_path / "real", tmp_path / "fake", "isc", capsys=capsys, weights=folder)
    assert len(seen) == 5


def test_all_figures_go_into_one_flat_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    folder, seen = inception
    reconstructions(tmp_path)
    result, said = run(
        tmp_path / "real", tmp_path / "fake", "fid", "isc", "kid", "prc", "psnr", "ssim", capsys=capsys, weights=folder
    )
    assert set(result) == {"fid", "isc", "kid", "precision", "recall", "psnr", "ssim", "protocol"}
    assert set(result["protocol"]["spread"]) == {"isc", "kid"}
    assert result["protocol"]["extractors"] == ["projection"]
    assert len(result["protocol"]["weights"]["inception"]["sha256"]) == 64
    assert "real has 5 images, fewer than 2048" in said
    assert "is not the published file" in said
    assert len(seen) == 10
    sets = tmp_path / "real", tmp_path / "fake"
    again, _ = run(
        *sets, "fid", "isc", "kid", "prc", capsys=capsys, weights=folder, batch_size=1, cache=tmp_path / "other"
    )
    assert len(seen) == 20
    figures = ("fid", "isc", "kid", "precision", "recall")
    assert [again[key] for key in figures] == pytest.approx([result[key] for key in figures], rel=1e-4)


def test_a_set_is_at_no_distance_from_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    write_images(tmp_path / "real", numbered(30))
    result, _ = run(tmp_path / "real", tmp_path / "real", "fid", "prc", capsys=capsys, weights=inception[0])
    assert result["fid"] < 1e-3
    assert (result["precision"], result["recall"]) == (1, 1)


def test_images_of_several_sizes_are_grouped_and_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    folder, seen = inception
    write_images(tmp_path / "real", numbered(6))
    write_images(tmp_path / "fake", numbered(6), side=24)
    write_images(tmp_path / "fake", ["003.png"], side=48)
    result, said = run(tmp_path / "real", tmp_path / "fake", "fid", capsys=capsys, weights=folder)
    assert "several sizes" in said
    assert result["protocol"]["fake"]["sizes"] == {"24x24": 5, "48x48": 1}
    assert sorted(seen) == [24] * 5 + [32] * 6 + [48]


def test_jpeg_on_one_side_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    originals = write_images(tmp_path / "real", ["1.png", "2.png"])
    write_images(tmp_path / "fake", ["1.jpg", "2.jpg"], base=originals)
    _, said = run(tmp_path / "real", tmp_path / "fake", "psnr", capsys=capsys)
    assert "only the fake images are JPEG" in said


def test_published_statistics_stand_in_for_the_real_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    folder, _ = inception
    write_images(tmp_path / "real", numbered(6))
    write_images(tmp_path / "fake", numbered(6), seed=1)
    expected, _ = run(tmp_path / "real", tmp_path / "fake", "fid", capsys=capsys, weights=folder)
    pixels = np.stack([np.asarray(Image.open(tmp_path / "real" / name)) for name in numbered(6)])
    features = extractors.load_inception()(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    statistics = distributions.FeatureStatistics(WIDTH)
    statistics.update(features)
    reference = tmp_path / "stats.npz"
    np.savez(reference, mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
    result, _ = run(reference, tmp_path / "fake", "fid", "isc", capsys=capsys, weights=folder)
    assert result["fid"] == pytest.approx(expected["fid"], rel=1e-6)
    assert len(result["protocol"]["real"]["sha256"]) == 64
    with pytest.raises(BadRequestError, match="kid needs real images"):
        run(reference, tmp_path / "fake", "kid", capsys=capsys, weights=folder)
    everything, said = run(reference, tmp_path / "fake", capsys=capsys, weights=folder)
    assert set(everything) == {"fid", "isc", "protocol"}
    assert "left out psnr" in said


def test_npz_files_of_pixels_stand_for_their_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    folder, _ = inception
    arrays = {}
    for seed, name in enumerate(("real", "fake")):
        write_images(tmp_path / name, numbered(6), seed=seed)
        arrays[name] = np.stack([np.asarray(Image.open(tmp_path / name / number)) for number in numbered(6)])
        np.savez(tmp_path / f"{name}.npz", arrays[name])
    expected, _ = run(tmp_path / "real", tmp_path / "fake", "fid", "kid", capsys=capsys, weights=folder)
    found, _ = run(tmp_path / "real.npz", tmp_path / "fake.npz", "fid", "kid", capsys=capsys, weights=folder)
    assert (found["fid"], found["kid"]) == (expected["fid"], expected["kid"])


@pytest.mark.parametrize("content", [{"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, {"mu": np.zeros(2048)}, None])
def test_unusable_statistics_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any) -> None:
    write_images(tmp_path / "fake", numbered(2))
    reference = tmp_path / "stats.npz"
    if content is None:
        reference.write_bytes(b"no archive")
    else:
        np.savez(reference, **content)
    with pytest.raises(BadRequestError, match=r"stats\.npz"):
        run(reference, tmp_path / "fake", "fid", capsys=capsys)


def test_unusable_inputs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "real", numbered(1))
    with pytest.raises(BadRequestError, match="nowhere"):
        run(tmp_path / "real", tmp_path / "nowhere", "psnr", capsys=capsys)
    with pytest.raises(BadRequestError, match="is a folder"):
        run(tmp_path / "real", tmp_path / "real", "psnr", capsys=capsys, out=tmp_path)
    with pytest.raises(BadRequestError, match="kid needs at least 2"):
        run(tmp_path / "real", tmp_path / "real", "kid", capsys=capsys)


def test_metrics_without_networks_are_printed_before_the_error_of_missing_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    originals, fakes = reconstructions(tmp_path)
    out = tmp_path / "result.json"
    with pytest.raises(BadRequestError, match=r"no weights weights-inception.*downloading"):
        run(tmp_path / "real", tmp_path / "fake", "psnr", "fid", capsys=capsys, out=out)
    assert json.loads(capsys.readouterr().out).items() <= json.loads(out.read_text()).items()
    assert json.loads(out.read_text())["psnr"] == scikit_means(originals, fakes, originals)[0]


def test_features_are_computed_once_for_all_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    folder, seen = inception
    reconstructions(tmp_path)
    first, _ = run(tmp_path / "real", tmp_path / "fake", "fid", "isc", capsys=capsys, weights=folder)
    again, _ = run(tmp_path / "real", tmp_path / "fake", "fid", "isc", "kid", capsys=capsys, weights=folder)
    assert len(seen) == 10
    assert (again["fid"], again["isc"]) == (first["fid"], first["isc"])


def test_a_corrupt_image_ends_a_strict_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    reconstructions(tmp_path)
    (tmp_path / "fake" / "002.png").write_bytes(b"")
    for metric in ("psnr", "fid"):
        with pytest.raises(FailureError, match=r"fake: cannot read 002\.png.*empty file"):
            run(tmp_path / "real", tmp_path / "fake", metric, capsys=capsys, weights=inception[0], strict=True)


def test_a_crop_makes_images_of_any_shape_comparable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    folder, seen = inception
    write_images(tmp_path / "fake", numbered(3), side=24)
    wide = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    (tmp_path / "real").mkdir()
    for name in numbered(3):
        Image.fromarray(wide).save(tmp_path / "real" / name)
        Image.fromarray(wide[:, 8:32]).save(tmp_path / "fake" / name)
    result, said = run(tmp_path / "real", tmp_path / "fake", "psnr", "fid", capsys=capsys, weights=folder, crop=24)
    assert result["psnr"] is None  # identical
    assert result["fid"] < 1e-6
    assert set(seen) == {24}
    assert "sizes" not in said
    assert result["protocol"]["real"]["crop"] == {"side": 24, "filter": "lanczos"}
    assert result["protocol"]["real"]["sizes"] == {"40x24": 3}


@pytest.mark.parametrize("name", ["stats.npz", "faces"])
def test_stored_statistics_replace_their_set(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    inception: tuple[Path, list[int]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, _ = inception
    write_images(tmp_path / "real", numbered(6))
    write_images(tmp_path / "fake", numbered(6), seed=1)
    expected, _ = run(tmp_path / "real", tmp_path / "fake", "fid", capsys=capsys, weights=folder)
    request = dataclasses.replace(PLAIN, weights=folder, cache=tmp_path / "cache")
    statistics(name, "real", request, arguments=[], console=Console(as_json=True, quiet=True))
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 6
    assert Path(result["path"]).is_file()
    result, _ = run(name, tmp_path / "fake", "fid", capsys=capsys, weights=folder)
    assert result["fid"] == expected["fid"]
    assert result["protocol"]["real"]["of"]["images"] == 6
    (folder / WEIGHTS["inception"].file).write_bytes(b"other weights")
    _, said = run(name, tmp_path / "fake", "fid", capsys=capsys, weights=folder)
    assert "made with other weights of Inception" in said


def test_references_with_images_and_statistics_serve_each_figure_as_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    folder, _ = inception
    images = write_images(tmp_path / "real", numbered(6))
    write_images(tmp_path / "fake", numbered(6), seed=1)
    mu, sigma = np.zeros(WIDTH), np.eye(WIDTH)
    np.savez(tmp_path / "both.npz", arr_0=np.stack([images[name] for name in sorted(images)]), mu=mu, sigma=sigma)
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    both, _ = run(tmp_path / "both.npz", tmp_path / "fake", "fid", "kid", "prc", capsys=capsys, weights=folder)
    alone, _ = run(tmp_path / "statistics.npz", tmp_path / "fake", "fid", capsys=capsys, weights=folder)
    plain, _ = run(tmp_path / "real", tmp_path / "fake", "kid", "prc", capsys=capsys, weights=folder)
    assert both["fid"] == alone["fid"]
    assert [both[key] for key in ("kid", "precision", "recall")] == [
        plain[key] for key in ("kid", "precision", "recall")
    ]


def test_copies_are_found_named_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    originals = write_images(tmp_path / "real", numbered(20))
    write_images(tmp_path / "fake", numbered(20), seed=1)
    write_images(tmp_path / "fake", ["007.png"], base={"007": originals["013"]}, noise=3)
    picture = tmp_path / "copies.png"
    result, _ = run(tmp_path / "real", tmp_path / "fake", "fid", capsys=capsys, weights=inception[0], copies=picture)
    nearest = result["protocol"]["nearest"]
    assert (nearest[0]["fake"], nearest[0]["real"]) == ("007.png", "013.png")
    assert nearest[0]["distance"] < 0.5 * nearest[1]["distance"]
    assert 0 < result["copies"] < 1
    grid, tiles = grids.read(picture)
    assert list(grid.row_labels) == ["fake", "nearest real"]
    assert grid.column_labels[0] == f"{nearest[0]['distance']:.3g}"
    tile, below = tiles[0].astype(int), tiles[grid.columns].astype(int)
    assert abs(tile - originals["013"]).max() <= 3
    assert np.array_equal(below, originals["013"])
    copied, _ = run(
        tmp_path / "real", tmp_path / "real", "fid", capsys=capsys, weights=inception[0], copies=tmp_path / "all.png"
    )
    assert copied["copies"] == 1


def test_published_figures_stand_beside_and_reconstructions_are_held_against_rfid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inception: tuple[Path, list[int]]
) -> None:
    reconstructions(tmp_path)
    result, _ = run(
        tmp_path / "real", tmp_path / "fake", "psnr", "fid", capsys=capsys, weights=inception[0], preset="ffhq"
    )
    published = result["protocol"]["published"]
    assert (published["psnr"], published["fid"], published["preset"]) == (26.72, 2.26, "ffhq")
    unknown, err = run(tmp_path / "real", tmp_path / "fake", "fid", capsys=capsys, weights=inception[0], preset="ffhq")
    assert "fid" not in unknown["protocol"]["published"]
    assert "no manifest of `movq sample`" in err
    for mode, published_fid in (("mask", 8.78), ("auto", 8.52), ("depth", None)):
        manifest = SampleManifest(settings={"mode": mode}, made_with={}, images=[])
        digests.write_header(tmp_path / "fake" / "manifest.json", manifest)
        samples, err = run(
            tmp_path / "real", tmp_path / "fake", "fid", capsys=capsys, weights=inception[0], preset="ffhq"
        )
        assert samples["protocol"]["published"].get("fid") == published_fid
        assert "no manifest" not in err
    printed, _ = run(tmp_path / "real", tmp_path / "fake", "psnr", capsys=capsys, as_json=False, preset="ffhq")
    assert printed.splitlines()[0].split("\t") == ["metric", "value", "published", "variant"]
    assert printed.splitlines()[1].split("\t")[2] == "26.72"


def measure(ranks: Ranks, given: tuple[Path, Path]) -> tuple[MetricValues, dict[str, Any], int]:
    """All figures of two folders, on a rank."""
    folder, path = given
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "INCEPTION_WIDTH", WIDTH)
        network = Projection()
        patch.setattr(extractors, "load_inception", lambda *_: extractors.Inception(network, "projection", WIDTH, path))
        metrics = ("psnr", "ssim", "fid", "isc", "kid", "prc")
        cache = folder / f"cache-{ranks.world_size}"
        request = dataclasses.replace(PLAIN, metrics=metrics, weights=path.parent, cache=cache)
        console = Console(quiet=True)
        sides = Sides.open(str(folder / "real"), str(folder / "fake"), request, console)
        comparison = Comparison(sides, request, ranks, torch.device("cpu"), console)
        with extractors.exact_float32():
            values = comparison.measure(select_metrics(sides, request, ranks, console).metrics)
        return values, comparison.protocol, len(network.seen)


def test_two_ranks_find_the_figures_of_one(tmp_path: Path, inception: tuple[Path, list[int]]) -> None:
    reconstructions(tmp_path, count=11)
    write_images(tmp_path / "fake", ["010.png"], side=40)
    (tmp_path / "fake" / "009.png").write_bytes(b"")
    given = (tmp_path, inception[0] / WEIGHTS["inception"].file)
    ((alone, protocol, _),) = on_ranks(measure, given, tmp_path, world=1)
    (first, shared, saw_first), (second, _, saw_second) = on_ranks(measure, given, tmp_path, world=2)
    assert saw_first + saw_second == 21
    assert first == pytest.approx(alone, rel=1e-9)
    assert second == {key: pytest.approx(alone[key], rel=1e-9) for key in ("psnr", "ssim")}
    for part in ("pairs", "real", "fake", "variants"):
        assert shared[part] == protocol[part]
    assert shared["fake"]["unreadable"] == ["009.png"]


def test_processes_share_the_work_of_the_command(movq: Movq, tmp_path: Path) -> None:
    originals, fakes = reconstructions(tmp_path)
    done = movq("evaluate", "--psnr", "--gpus", "2", "--device", "cpu", "real", "fake", "--json")
    assert json.loads(done.stdout)["psnr"] == scikit_means(originals, fakes, originals)[0]


def test_processes_that_lack_weights_give_the_other_figures_and_end_alike(movq: Movq, tmp_path: Path) -> None:
    originals, fakes = reconstructions(tmp_path)
    closed = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    arguments = ["--psnr", "--fid", "--kid", "--gpus", "2", "--device", "cpu", "real", "fake", "--json"]
    done = movq("evaluate", *arguments, code=2, **closed)
    assert json.loads(done.stdout)["psnr"] == scikit_means(originals, fakes, originals)[0]
    assert done.stderr.count("error: no weights weights-inception") == 1


def test_the_codebook_is_counted_over_the_images_and_each_chunk(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    model = Tokenizer.load("runs/tiny-vq")
    request = dataclasses.replace(PLAIN, run=Path("runs/tiny-vq"))
    codebook("data", request, Console(as_json=True, quiet=True))
    result = json.loads(capsys.readouterr().out)
    split = PreparedSet.open(Path("data")).split("val")
    found = []
    with torch.inference_mode():
        for index in range(len(split)):
            image = split.pixels(index).astype(np.float32) / 127.5 - 1
            spare = [(0, -side % model.settings.factor) for side in image.shape[:2]]
            padded = np.pad(image, (*spare, (0, 0)), mode="edge")
            found.append(model.encode(torch.from_numpy(padded).permute(2, 0, 1)[None]).flatten(0, 2))
    codes = torch.cat(found)
    counts = np.bincount(codes.flatten(), minlength=model.settings.codebook_size)
    share = counts[counts > 0] / counts.sum()
    assert result["codebook_usage"] == pytest.approx((counts > 0).mean())
    assert result["codebook_perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    used = [len(codes[..., chunk].unique()) for chunk in range(model.settings.chunks)]
    assert result["protocol"]["codebook"]["usage_of_chunks"] == pytest.approx(
        [number / model.settings.codebook_size for number in used]
    )


@pytest.mark.parametrize(
    ("arguments", "expected_words"),
    [
        (["real"], "two sets are compared, REAL and FAKE, not 1 (real)"),
        (["real", "fake", "more", "--fid"], "not 3 (real, fake, more)"),
        (["--stats", "x.npz", "real", "fake"], "--stats takes one set, not 2"),
        (["real", "--codebook", "--psnr"], "two sets are compared"),
        (["real", "fake", "--split", "test"], "neither train nor val"),
        (["real", "fake", "--preset", "ffhp"], "Did you mean 'ffhq' or 'ffhq-plus'?"),
    ],
)
def test_a_wrong_number_of_sets_or_an_unknown_name_is_refused(
    movq: Movq, arguments: list[str], expected_words: str
) -> None:
    assert expected_words in movq("evaluate", *arguments, code=2).stderr


def alexnet_weights(folder: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    tensors = {}
    for number, (out, into, side) in shapes.items():
        weight = torch.randn(out, into, side, side, generator=generator)
        tensors[f"features.{number}.weight"] = weight * (2 / (into * side**2)) ** 0.5
        tensors[f"features.{number}.bias"] = torch.zeros(out)
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / WEIGHTS["alex"].file)
    return tensors


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_of_folders_is_the_librarys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    originals, fakes = reconstructions(tmp_path, count=3)
    tensors = alexnet_weights(tmp_path / "weights")
    result, _ = run(tmp_path / "real", tmp_path / "fake", "lpips", capsys=capsys, weights=tmp_path / "weights")
    theirs = lpips_library.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, parameter in theirs.net.named_parameters():
        parameter.data.copy_(tensors[f"features.{name.split('.', 1)[1]}"])

    def signed(images: Pixels) -> Tensor:
        stacked = np.stack([images[name] for name in sorted(originals)])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1

    with torch.inference_mode():
        expected = theirs(signed(originals), signed(fakes)).mean().item()
    assert result["lpips"] == pytest.approx(expected, rel=1e-5)
    assert "alex" in result["protocol"]["variants"]["lpips"]
    assert set(result["protocol"]["weights"]) == {"alex"}


@pytest.mark.slow
def test_kernel_distance_by_the_real_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Structure(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any) -> None:
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Structure("bare", ["2048"], feature_extractor_weights_path=empty)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), tmp_path / WEIGHTS["inception"].file)
    for role, seed in (("real", 0), ("fake", 1)):
        write_images(tmp_path / role, numbered(2), seed=seed)
    result, _ = run(tmp_path / "real", tmp_path / "fake", "kid", capsys=capsys, weights=tmp_path)
    features = []
    for role in ("real", "fake"):
        pixels = np.stack([np.asarray(Image.open(tmp_path / role / name)) for name in numbered(2)])
        with torch.inference_mode():
            features.append(network(torch.from_numpy(pixels).permute(0, 3, 1, 2))[0])
    expected = distributions.kernel_distance(*features, subsets=KID.subsets, subset_size=KID.subset_size).mean
    # KID is a small difference of large kernel values: the rounding of float32 features is relative to those values.
    both = torch.cat(features).double()
    largest = float((both @ both.T / both.shape[1] + 1).pow(3).max())
    assert result["kid"] == pytest.approx(expected, abs=4 * torch.finfo(torch.float32).eps * largest)
    assert expected > 20 * torch.finfo(torch.float32).eps * largest
