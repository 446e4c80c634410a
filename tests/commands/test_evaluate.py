import dataclasses
import io
import json
import zipfile

import lpips as lpips_library
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from movq_cli.commands.evaluate import evaluate
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.metrics import distributions, extractors
from movq_cli.metrics.extractors import WEIGHTS

METRICS = ("fid", "isc", "kid", "prc", "psnr", "ssim", "lpips")
SIDE = 32
WIDTH = 64  # of the stand-in for Inception: eigenvalues of 2,048 take seconds


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty hub folder, and downloads from a port where nobody listens."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name, known in list(WEIGHTS.items()):
        closed = dataclasses.replace(known, url=f"http://127.0.0.1:9/{known.file}")
        monkeypatch.setitem(WEIGHTS, name, closed)


@pytest.fixture
def inception(monkeypatch, tmp_path):
    """A folder that seems to hold Inception's weights, and a network of random projections in its place."""
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(3 * 8 * 8, WIDTH, generator=generator) / 14
    seen = []

    class Stub:
        def __call__(self, images):
            seen.extend(images.shape[0] * [images.shape[2]])
            assert images.dtype == torch.uint8
            pooled = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)
            features = pooled @ projection
            return features, features[:, :20]

    folder = tmp_path / "weights"
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS["inception"].file).write_bytes(b"stub")
    monkeypatch.setattr(extractors, "INCEPTION_WIDTH", WIDTH)
    monkeypatch.setattr(extractors, "INCEPTION_CLASSES", 20)
    monkeypatch.setattr(extractors, "load_inception", lambda *_: Stub())
    return folder, seen


def write_images(folder, names, seed=0, side=SIDE, base=None, noise=0):
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


def numbered(count):
    return [f"{i:03d}.png" for i in range(count)]


def run(first, second, *asked, capsys, as_json=True, **options):
    """The printed result and the lines on stderr."""
    options = {"split": "val", "batch_size": 4, "weights": None, "device": "cpu", "out": None} | options
    flags = {metric: metric in asked for metric in METRICS}
    console = Console(as_json=as_json, quiet=True)
    capsys.readouterr()
    evaluate(str(first), str(second), console=console, **flags, **options)
    printed, said = capsys.readouterr()
    return (json.loads(printed) if as_json else printed), said


def reconstructions(tmp_path, count=5):
    originals = write_images(tmp_path / "real", numbered(count))
    fakes = write_images(tmp_path / "fake", numbered(count), seed=1, base=originals, noise=30)
    return originals, fakes


def scikit_means(originals, fakes, names):
    psnr, ssim = [], []
    for name in names:
        a, b = originals[name] / 255, fakes[name] / 255
        psnr.append(peak_signal_noise_ratio(a, b, data_range=1.0))
        ssim.append(structural_similarity(a, b, win_size=11, channel_axis=-1, data_range=1.0))
    return pytest.approx(np.mean(psnr)), pytest.approx(np.mean(ssim))


def test_psnr_and_ssim_of_folders_are_scikit_images(tmp_path, capsys):
    originals, fakes = reconstructions(tmp_path)
    out = tmp_path / "deep" / "result.json"
    result, said = run(tmp_path / "real", tmp_path / "fake", "psnr", "ssim", capsys=capsys, out=out)
    assert (result["psnr"], result["ssim"]) == scikit_means(originals, fakes, originals)
    assert set(result) == {"psnr", "ssim", "protocol"}
    assert json.loads(out.read_text()) == result
    protocol = result["protocol"]
    assert protocol["pairs"]["averaged"] == {"psnr": 5, "ssim": 5}
    assert protocol["real"]["sizes"] == {"32x32": 5}
    assert "11x11" in protocol["variants"]["ssim"]
    assert {"movq", "torch", "torch-fidelity", "lpips"} <= set(protocol["versions"])
    assert said == ""


def test_without_json_the_figures_are_a_table_with_their_variants(tmp_path, capsys):
    reconstructions(tmp_path)
    printed, _ = run(tmp_path / "real", tmp_path / "fake", "psnr", capsys=capsys, as_json=False)
    header, row = printed.splitlines()
    assert header.split("\t") == ["figure", "value", "variant"]
    assert row.startswith("psnr\t")
    assert "RGB in [0,1]" in row


def test_pairs_match_by_name_through_folders_archives_and_suffixes(tmp_path, capsys):
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


def test_no_pair_at_all_is_refused_before_anything_is_read(tmp_path, capsys):
    write_images(tmp_path / "real", ["a.png"])
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "b.png").write_bytes(b"never decoded")
    with pytest.raises(BadRequestError, match=r"no image.*partner"):
        run(tmp_path / "real", tmp_path / "fake", "psnr", capsys=capsys)


def test_a_corrupt_image_is_named_once_and_left_out(tmp_path, capsys, inception):
    originals, fakes = reconstructions(tmp_path)
    whole = (tmp_path / "fake" / "002.png").read_bytes()
    (tmp_path / "fake" / "002.png").write_bytes(whole[: len(whole) // 2])
    result, said = run(tmp_path / "real", tmp_path / "fake", "psnr", "fid", capsys=capsys, weights=inception[0])
    assert result["psnr"] == scikit_means(originals, fakes, ["000", "001", "003", "004"])[0]
    assert result["protocol"]["fake"]["unreadable"] == ["002.png"]
    assert said.count("002.png") == 1


def test_pairs_of_unequal_sizes_are_left_out_and_counted(tmp_path, capsys):
    originals, fakes = reconstructions(tmp_path)
    write_images(tmp_path / "fake", ["001.png"], side=40)
    result, said = run(tmp_path / "real", tmp_path / "fake", "psnr", capsys=capsys)
    assert result["psnr"] == scikit_means(originals, fakes, ["000", "002", "003", "004"])[0]
    assert result["protocol"]["pairs"]["of_unequal_sizes"] == 1
    assert "1 pairs of unequal sizes: 001.png" in said
    assert "several sizes" in said


def test_identical_images_do_not_make_the_mean_infinite(tmp_path, capsys):
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


def test_images_too_small_for_a_figure_are_an_error_only_when_it_was_asked_for(tmp_path, capsys):
    write_images(tmp_path / "real", numbered(2), side=8)
    write_images(tmp_path / "fake", numbered(2), side=8, seed=1)
    with pytest.raises(BadRequestError, match=r"ssim needs.*11 pixels"):
        run(tmp_path / "real", tmp_path / "fake", "ssim", capsys=capsys)
    result, said = run(tmp_path / "real", tmp_path / "fake", capsys=capsys)
    assert set(result) == {"psnr", "protocol"}
    assert "left out ssim" in said


def test_with_nothing_asked_for_whatever_is_possible_is_computed_and_the_rest_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    reconstructions(tmp_path)
    result, said = run(tmp_path / "real", tmp_path / "fake", capsys=capsys)
    assert set(result) == {"psnr", "ssim", "protocol"}
    assert "left out fid, isc, kid, prc: no weights weights-inception-2015-12-05-6726825d.pth" in said
    assert "left out lpips: no weights alexnet-owt-7be5be79.pth" in said
    write_images(tmp_path / "samples", ["x.png"])
    with pytest.raises(BadRequestError, match=r"no figure can be computed.*partner.*weights"):
        run(tmp_path / "real", tmp_path / "samples", capsys=capsys)


@pytest.mark.parametrize(("metric", "file"), [("fid", "weights-inception"), ("lpips", "alexnet-owt")])
def test_weights_that_were_asked_for_and_cannot_be_had_end_the_run_at_once(tmp_path, capsys, metric, file):
    reconstructions(tmp_path)
    with pytest.raises(BadRequestError, match=rf"no weights {file}.*downloading.*--weights"):
        run(tmp_path / "real", tmp_path / "fake", metric, capsys=capsys)


def test_the_first_set_is_real_and_the_second_fake(tmp_path, capsys, inception):
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


def test_inception_score_looks_at_the_second_set_only(tmp_path, capsys, inception):
    folder, seen = inception
    reconstructions(tmp_path)
    run(tmp_path / "real", tmp_path / "fake", "isc", capsys=capsys, weights=folder)
    assert len(seen) == 5


def test_all_figures_go_into_one_flat_result(tmp_path, capsys, inception):
    folder, seen = inception
    reconstructions(tmp_path)
    result, said = run(
        tmp_path / "real", tmp_path / "fake", "fid", "isc", "kid", "prc", "psnr", "ssim", capsys=capsys, weights=folder
    )
    assert set(result) == {"fid", "isc", "kid", "precision", "recall", "psnr", "ssim", "protocol"}
    assert set(result["protocol"]["spread"]) == {"isc", "kid"}
    assert result["protocol"]["extractor"] == "inception-v3-compat"
    assert len(result["protocol"]["weights"]["inception"]["sha256"]) == 64
    assert "real has 5 images, fewer than 2048" in said
    assert "is not the published file" in said
    assert len(seen) == 10
    again, _ = run(
        tmp_path / "real", tmp_path / "fake", "fid", "isc", "kid", "prc", capsys=capsys, weights=folder, batch_size=1
    )
    figures = ("fid", "isc", "kid", "precision", "recall")
    assert [again[key] for key in figures] == pytest.approx([result[key] for key in figures], rel=1e-4)


def test_a_set_is_at_no_distance_from_itself(tmp_path, capsys, inception):
    write_images(tmp_path / "real", numbered(30))
    result, _ = run(tmp_path / "real", tmp_path / "real", "fid", "prc", capsys=capsys, weights=inception[0])
    assert result["fid"] < 1e-3
    assert (result["precision"], result["recall"]) == (1, 1)


def test_images_of_several_sizes_are_grouped_and_warned_of(tmp_path, capsys, inception):
    folder, seen = inception
    write_images(tmp_path / "real", numbered(6))
    write_images(tmp_path / "fake", numbered(6), side=24)
    write_images(tmp_path / "fake", ["003.png"], side=48)
    result, said = run(tmp_path / "real", tmp_path / "fake", "fid", capsys=capsys, weights=folder)
    assert "several sizes" in said
    assert result["protocol"]["fake"]["sizes"] == {"24x24": 5, "48x48": 1}
    assert sorted(seen) == [24] * 5 + [32] * 6 + [48]


def test_jpeg_on_one_side_is_warned_of(tmp_path, capsys):
    originals = write_images(tmp_path / "real", ["1.png", "2.png"])
    write_images(tmp_path / "fake", ["1.jpg", "2.jpg"], base=originals)
    _, said = run(tmp_path / "real", tmp_path / "fake", "psnr", capsys=capsys)
    assert "only the fake images are JPEG" in said


def test_published_statistics_stand_in_for_the_real_images(tmp_path, capsys, inception):
    folder, _ = inception
    write_images(tmp_path / "real", numbered(6))
    write_images(tmp_path / "fake", numbered(6), seed=1)
    expected, _ = run(tmp_path / "real", tmp_path / "fake", "fid", capsys=capsys, weights=folder)
    pixels = np.stack([np.asarray(Image.open(tmp_path / "real" / name)) for name in numbered(6)])
    features, _ = extractors.load_inception()(torch.from_numpy(pixels).permute(0, 3, 1, 2))
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


def test_npz_files_of_pixels_stand_for_their_images(tmp_path, capsys, inception):
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
def test_unusable_statistics_are_refused(tmp_path, capsys, content):
    write_images(tmp_path / "fake", numbered(2))
    reference = tmp_path / "stats.npz"
    if content is None:
        reference.write_bytes(b"no archive")
    else:
        np.savez(reference, **content)
    with pytest.raises(BadRequestError, match=r"stats\.npz"):
        run(reference, tmp_path / "fake", "fid", capsys=capsys)


def test_unusable_inputs_are_refused(tmp_path, capsys):
    write_images(tmp_path / "real", numbered(1))
    with pytest.raises(BadRequestError, match="nowhere"):
        run(tmp_path / "real", tmp_path / "nowhere", "psnr", capsys=capsys)
    with pytest.raises(BadRequestError, match="is a folder"):
        run(tmp_path / "real", tmp_path / "real", "psnr", capsys=capsys, out=tmp_path)
    with pytest.raises(BadRequestError, match="kid needs at least 2"):
        run(tmp_path / "real", tmp_path / "real", "kid", capsys=capsys)


def alexnet_weights(folder):
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
def test_lpips_of_folders_is_the_librarys(tmp_path, capsys):
    originals, fakes = reconstructions(tmp_path, count=3)
    tensors = alexnet_weights(tmp_path / "weights")
    result, _ = run(tmp_path / "real", tmp_path / "fake", "lpips", capsys=capsys, weights=tmp_path / "weights")
    theirs = lpips_library.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, parameter in theirs.net.named_parameters():
        parameter.data.copy_(tensors[f"features.{name.split('.', 1)[1]}"])

    def signed(images):
        stacked = np.stack([images[name] for name in sorted(originals)])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1

    with torch.inference_mode():
        expected = theirs(signed(originals), signed(fakes)).mean().item()
    assert result["lpips"] == pytest.approx(expected, rel=1e-5)
    assert "alex" in result["protocol"]["variants"]["lpips"]
    assert set(result["protocol"]["weights"]) == {"alex"}


def test_kernel_distance_by_the_real_network(tmp_path, capsys):
    class Structure(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):  # type: ignore[override]
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Structure("bare", ["2048"], feature_extractor_weights_path=empty)
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
    assert result["kid"] == pytest.approx(distributions.kernel_distance(*features).mean, rel=1e-4)
