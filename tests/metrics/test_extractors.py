import dataclasses
import io
import socket
import warnings

import lpips
import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from movq_cli.data import stream
from movq_cli.errors import BadRequestError
from movq_cli.metrics import extractors
from movq_cli.metrics.extractors import WEIGHTS

CPU = torch.device("cpu")

VGG = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256)}
VGG |= {17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
LAYERS = {
    "alex": {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)},
    "vgg": {number: (*channels, 3) for number, channels in VGG.items()},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty hub folder, and downloads from a port where nobody listens."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name, known in list(WEIGHTS.items()):
        closed = dataclasses.replace(known, url=f"http://127.0.0.1:9/{known.file}")
        monkeypatch.setitem(WEIGHTS, name, closed)


def trunk_weights(trunk):
    """torchvision's layout, classifier included, with weights from a seed."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (out, into, side) in LAYERS[trunk].items():
        weight = torch.randn(out, into, side, side, generator=generator)
        tensors[f"features.{number}.weight"] = weight * (2 / (into * side**2)) ** 0.5
        tensors[f"features.{number}.bias"] = torch.randn(out, generator=generator) * 0.1
    return tensors | {"classifier.6.bias": torch.zeros(1000)}


class _Structure(FeatureExtractorInceptionV3):
    """The library's network as it comes from its constructor, with no file read."""

    def load_state_dict(self, state_dict):  # type: ignore[override]
        return None


def bare_inception():
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _Structure("bare", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                # With torch's own initialisation nothing but denormal numbers would reach the last layer.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


def save(folder, name, tensors):
    path = folder / WEIGHTS[name].file
    torch.save(tensors, path)
    return path


def image_pair(count=2, side=64):
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, count, 3, side, side, generator=generator) * 2 - 1
    return a, b


@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_lpips_is_the_librarys_own_with_the_same_trunk(tmp_path, trunk):
    tensors = trunk_weights(trunk)
    save(tmp_path, trunk, tensors)
    ours = extractors.load_lpips(trunk, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    for name, parameter in theirs.net.named_parameters():
        parameter.data.copy_(tensors[f"features.{name.split('.', 1)[1]}"])
    a, b = image_pair()
    torch.testing.assert_close(ours(a, b), theirs(a, b), atol=0, rtol=0)
    assert ours(a, b).shape == (2, 1, 1, 1)
    assert (ours(a, b) > 0).all()
    assert ours(a, a).tolist() == [[[[0.0]]]] * 2


def test_lpips_stays_frozen_in_eval_and_float32_inside_a_training_model(tmp_path):
    save(tmp_path, "alex", trunk_weights("alex"))
    judge = extractors.load_lpips("alex", tmp_path)
    nn.ModuleDict({"judge": judge}).train()
    assert not any(module.training for module in judge.modules())
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    a, b = image_pair()
    expected = judge(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(judge(a, b), expected)
        assert judge(a.bfloat16(), b).dtype == torch.float32
    a.requires_grad_()
    judge(a, b).sum().backward()
    assert a.grad.abs().sum() > 0


def test_loading_is_silent_and_leaves_the_random_stream_alone(tmp_path, capsys, recwarn):
    save(tmp_path, "alex", trunk_weights("alex"))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    extractors.load_lpips("alex", tmp_path)
    assert torch.rand(1) == expected
    assert capsys.readouterr().out == ""
    assert not recwarn.list


def test_inception_features_are_torch_fidelitys(tmp_path):
    theirs = bare_inception()
    save(tmp_path, "inception", theirs.state_dict())
    ours = extractors.load_inception(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 40, 48), dtype=torch.uint8, generator=generator)
    nn.ModuleDict({"ours": ours}).train()
    found, expected = ours(images), theirs(images)
    assert [features.shape for features in found] == [(1, 2048), (1, 1008)]
    for features, theirs_features in zip(found, expected, strict=True):
        torch.testing.assert_close(features, theirs_features, atol=0, rtol=0)
    assert found[0].std() > 0.01


def test_the_users_folder_wins_over_the_hubs(tmp_path):
    hub = tmp_path / "hub" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    there = save(hub, "alex", {})
    assert extractors.find_weights("alex") == there
    assert extractors.find_weights("alex", tmp_path) == there
    assert extractors.trunks_here() == ["alex"]
    here = save(tmp_path, "alex", {})
    assert extractors.find_weights("alex", tmp_path) == here


@pytest.mark.parametrize("name", ["inception", "vgg", "alex"])
def test_missing_weights_say_which_file_where_and_what_to_do(tmp_path, name):
    patience = socket.getdefaulttimeout()
    with pytest.raises(BadRequestError) as caught:
        extractors.find_weights(name, tmp_path)
    message = str(caught.value)
    known = WEIGHTS[name]
    wanted = [
        known.file,
        f"{known.megabytes} MB",
        str(tmp_path),
        "checkpoints",
        "--weights",
        known.url,
        "refused",
    ]
    assert all(part in message for part in wanted)
    assert socket.getdefaulttimeout() == patience
    assert not list((tmp_path / "hub").rglob("*.p*"))


def test_nothing_is_downloaded_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(BadRequestError, match="no weights"):
        extractors.find_weights("vgg", download=False)
    with pytest.raises(BadRequestError, match="no folder of weights"):
        extractors.find_weights("vgg", tmp_path / "nowhere")


def test_a_download_lands_in_the_hub_folder_checked_against_its_hash(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: calls.append((args, kwargs)))
    path = extractors.find_weights("vgg")
    assert path.parent.name == "checkpoints"
    assert calls == [((WEIGHTS["vgg"].url, str(path)), {"hash_prefix": "397923af", "progress": False})]


class _Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        from pathlib import Path

        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["inception", "alex"])
def test_weights_that_hold_code_are_refused_and_the_code_does_not_run(tmp_path, name):
    mark = tmp_path / "the code ran"
    path = save(tmp_path, name, {"features.0.weight": _Bomb(mark)})
    with pytest.raises(BadRequestError, match="code") as caught:
        extractors.load_inception(tmp_path) if name == "inception" else extractors.load_lpips(name, tmp_path)
    assert str(path) in str(caught.value)
    assert not mark.exists()


def test_damaged_files_and_other_objects_are_refused(tmp_path):
    path = tmp_path / WEIGHTS["alex"].file
    for content in (b"", b"<html>not found</html>", b"\x80\x02}q"):
        path.write_bytes(content)
        with pytest.raises(BadRequestError, match="damaged"):
            extractors.load_lpips("alex", tmp_path)
    save(tmp_path, "alex", [torch.zeros(1)])
    with pytest.raises(BadRequestError, match="table of tensors"):
        extractors.load_lpips("alex", tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("features.10.bias"), "features.10.bias"),
        (lambda t: t.update({"features.11.weight": torch.zeros(1)}), "features.11.weight"),
        (lambda t: t.update({"head.weight": torch.zeros(1)}), "head.weight"),
        (lambda t: t.update({"features.0.bias": torch.zeros(65)}), "features.0.bias"),
    ],
)
def test_a_missing_or_odd_tensor_of_the_trunk_is_named(tmp_path, change, named):
    tensors = trunk_weights("alex")
    change(tensors)
    path = save(tmp_path, "alex", tensors)
    with pytest.raises(BadRequestError, match="layout") as caught:
        extractors.load_lpips("alex", tmp_path)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


def test_another_networks_weights_are_not_inceptions(tmp_path):
    save(tmp_path, "inception", trunk_weights("alex"))
    with pytest.raises(BadRequestError, match="layout"):
        extractors.load_inception(tmp_path)


def constant_judge():
    """Stands in for Inception: the image's mean as every feature."""

    def forward(images):
        mean = images.float().mean(dim=(1, 2, 3))[:, None]
        return mean.expand(-1, extractors.INCEPTION_WIDTH), mean.expand(-1, extractors.INCEPTION_CLASSES)

    return forward


def test_features_keep_the_order_of_the_set_whatever_the_batches():
    images = [torch.full((3, 8 + i % 3, 8), i, dtype=torch.uint8) for i in range(20)]
    for batch_size in (1, 4, 32):
        batches = list(stream.same_size_batches(enumerate(images), batch_size))
        assert max(len(places) for places, _ in batches) <= batch_size
        found = extractors.collect_features(constant_judge(), batches, CPU)
        assert found.pool[:, 0].tolist() == list(range(20))
        assert found.logits.shape == (20, 1008)
        assert found.statistics.mean[0].item() == pytest.approx(9.5)


def test_features_that_are_not_asked_for_are_not_kept():
    images = [(0, torch.zeros(3, 8, 8, dtype=torch.uint8))]
    found = extractors.collect_features(constant_judge(), stream.same_size_batches(images, 1), CPU, keep=())
    assert len(found.pool) == len(found.logits) == 0
    assert found.statistics.count == 1
