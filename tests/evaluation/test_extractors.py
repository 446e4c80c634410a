"""The pretrained networks equal the libraries they come from, stay frozen, and never run code from a file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

from movq_cli.errors import BadRequestError
from movq_cli.evaluation import extractors
from movq_cli.evaluation.extractors import Trunk
from movq_cli.evaluation.pretrained import WEIGHTS, Network
from movq_cli.files import sha256

VGG = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256)}
VGG |= {17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
LAYERS = {
    "alex": {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)},
    "vgg": {number: (*channels, 3) for number, channels in VGG.items()},
}


pytestmark = pytest.mark.usefixtures("offline")


def trunk_weights(trunk: Trunk) -> dict[str, Tensor]:
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

    def load_state_dict(self, state_dict: Any) -> None:
        return None


def bare_inception() -> FeatureExtractorInceptionV3:
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


def hidden_layers() -> dict[str, Tensor]:
    """VGG's classifier, each matrix a few numbers seen through a window that slides: half a gigabyte otherwise."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (out, into) in {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}.items():
        numbers = torch.randn(out + into, generator=generator) * (2 / into) ** 0.5
        tensors[f"classifier.{number}.weight"] = numbers.as_strided((out, into), (1, 1))
        tensors[f"classifier.{number}.bias"] = torch.zeros(out)
    return tensors


def save(folder: Path, name: Network, tensors: object) -> Path:
    path = folder / WEIGHTS[name].file
    torch.save(tensors, path)
    return path


def image_pair(count: int = 2, side: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, count, 3, side, side, generator=generator) * 2 - 1
    return a, b


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_lpips_is_the_librarys_own_with_the_same_trunk(tmp_path: Path, trunk: Trunk) -> None:
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


def test_lpips_stays_frozen_in_eval_and_float32_inside_a_training_model(tmp_path: Path) -> None:
    save(tmp_path, "alex", trunk_weights("alex"))
    network = extractors.load_lpips("alex", tmp_path)
    nn.ModuleDict({"part": network}).train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    a, b = image_pair()
    expected = network(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(a, b), expected)
        assert network(a.bfloat16(), b).dtype == torch.float32
    a.requires_grad_()
    network(a, b).sum().backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0


def test_loading_is_silent_and_leaves_the_random_stream_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    save(tmp_path, "alex", trunk_weights("alex"))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    extractors.load_lpips("alex", tmp_path)
    assert torch.rand(1) == expected
    assert capsys.readouterr().out == ""
    assert not recwarn.list


@pytest.mark.slow
def test_inception_features_are_torch_fidelitys_to_a_millionth(tmp_path: Path) -> None:
    theirs = bare_inception()
    path = save(tmp_path, "inception", theirs.state_dict())
    ours = extractors.load_inception(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8, generator=generator)
    nn.ModuleDict({"ours": ours}).train()
    pool, logits = theirs(images)
    found = ours(images)
    assert found.shape == (2, ours.width) == (2, 2048)
    assert found.std() > 0.01
    torch.testing.assert_close(found, pool, atol=1e-6 * pool.abs().max().item(), rtol=0)
    torch.testing.assert_close(ours.logits(pool), logits, atol=0, rtol=0)
    assert (ours.name, ours.digest) == ("inception-v3-compat", sha256(path))


@pytest.mark.slow
def test_vgg_features_are_torch_fidelitys(tmp_path: Path) -> None:
    tensors = trunk_weights("vgg") | hidden_layers()
    path = save(tmp_path, "vgg", tensors)
    torch.manual_seed(3)
    ours = extractors.load_vgg(tmp_path)
    assert torch.initial_seed() == 3
    theirs = FeatureExtractorVGG16("vgg", ["fc2_relu"], feature_extractor_weights_path=str(path))
    images = torch.randint(0, 256, (1, 3, 50, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (expected,) = theirs(images)
    assert expected.shape == (1, ours.width)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(images), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["inception", "alex"])
def test_weights_that_hold_code_are_refused_and_the_code_does_not_run(tmp_path: Path, name: Network) -> None:
    mark = tmp_path / "the code ran"
    path = save(tmp_path, name, {"features.0.weight": _Bomb(mark)})
    with pytest.raises(BadRequestError, match="code") as caught:
        extractors.load_inception(tmp_path) if name == "inception" else extractors.load_lpips("alex", tmp_path)
    assert str(path) in str(caught.value)
    assert not mark.exists()


def test_damaged_files_and_other_objects_are_refused(tmp_path: Path) -> None:
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
def test_a_missing_or_odd_tensor_of_the_trunk_is_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], named: str
) -> None:
    tensors = trunk_weights("alex")
    change(tensors)
    path = save(tmp_path, "alex", tensors)
    with pytest.raises(BadRequestError, match="layout") as caught:
        extractors.load_lpips("alex", tmp_path)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


def test_another_networks_weights_are_not_inceptions(tmp_path: Path) -> None:
    save(tmp_path, "inception", trunk_weights("alex"))
    with pytest.raises(BadRequestError, match="layout"):
        extractors.load_inception(tmp_path)
