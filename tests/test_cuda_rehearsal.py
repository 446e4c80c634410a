"""Passes on CUDA without a CUDA device, on tensors that have a device, a type and a shape, but no data.

An operation on tensors of two devices, or of two types that autocast does not mix, fails as it would on the device.
What the device computes, and whether a graph can be recorded, is tested in `test_cuda.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from movq_cli import presets
from movq_cli.evaluation import paired
from movq_cli.models import autoregressive_prior, draws, masked_prior, priors
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import SampleSettings
from movq_cli.training import losses

pytestmark = pytest.mark.slow

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _on_cuda() -> Iterator[None]:
    """Enable bf16 autocast by hand, because `devices.autocast` needs a device."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with FakeTensorMode():
        yield
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", dtype)


class NoWaiting(TorchDispatchMode):
    """Refuse what a CUDA graph cannot record: reading a value, and copies between host and device."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {"cuda"}, operation
        assert operation.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return result


class Rehearsal:
    """A stand-in for GraphRecorder that runs each step as if it were recorded."""

    def reuse(self, key: object, weights: object, make: Callable[[], Any]) -> Any:
        return make()

    def run(self, kind: object, step: Callable[[], object]) -> None:
        with NoWaiting():
            step()


def small_prior(mode: str, classes: int) -> priors.CodePrior:
    """Return a prior with the widths of the paper, few layers and positions, and linear layers stored in bf16."""
    smaller = ["prior.layers=3", "vq.resolution=64", "vq.attention_resolutions=[4]"]
    preset = presets.load("ffhq", [f"prior.mode={mode}", f"prior.classes={classes}", *smaller])
    with CUDA:
        model = priors.build(preset.prior, preset.vq.code_shape).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):  # fake tensors cannot be converted in place
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(parameter.detach().to(torch.bfloat16)))
    return model


@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("mode", ["mask", "auto", "depth"])
def test_a_prior_passes_codes_in_bf16(mode: str, classes: int) -> None:
    model = small_prior(mode, classes)
    codes = torch.zeros(3, 4, 4, 4, dtype=torch.int64, device=CUDA)
    labels = torch.arange(3, device=CUDA) if classes else None
    hidden = torch.ones_like(codes, dtype=torch.bool)
    with NoWaiting():
        logits = model(model.inputs(codes, hidden), labels)
        loss = masked_prior.masked_loss(logits, codes, hidden, 0.1)
    assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", torch.bfloat16, (3, 4, 4, 4, 1024))
    assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())


@pytest.mark.parametrize("options", [{}, {"top_k": 9, "top_p": 0.9, "temperature": 0.8}])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("mode", ["auto", "depth"])
def test_nothing_in_a_recorded_step_waits(
    mode: str, classes: int, guidance: float, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoregressive_prior, "GraphRecorder", Rehearsal)
    model = small_prior(mode, classes)
    labels = torch.arange(3, device=CUDA) if classes else None
    codes = model.decode(range(3), labels, SampleSettings(guidance=guidance, **options))
    assert (codes.device.type, codes.dtype, codes.shape) == ("cuda", torch.int64, (3, 4, 4, 4))


def test_the_masked_prior_never_waits_between_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_prior("mask", 0)
    uniforms = torch.zeros(
        3, 8, 2, 64, device=CUDA
    )  # as if they were there: that they are brought is waited for, once a batch
    monkeypatch.setattr(draws, "image_uniforms", lambda seeds, shape: uniforms)
    with NoWaiting():
        codes = model.decode(range(3), None, SampleSettings(steps=8))
    assert (codes.device.type, codes.dtype, codes.shape) == ("cuda", torch.int64, (3, 4, 4, 4))


def test_both_networks_of_stage_1_pass_images_without_waiting() -> None:
    preset = presets.load("ffhq")
    with CUDA:
        tokenizer = Tokenizer(preset.vq)
        discriminator = PatchDiscriminator(preset.train_vq.discriminator_channels, preset.train_vq.discriminator_layers)
        images = torch.rand(2, 3, 256, 256).contiguous(memory_format=torch.channels_last)
        gradients = torch.zeros(2, 2, 3, 256, 256)
    with NoWaiting():
        out = tokenizer(images)
        loss = losses.reconstruction(out.images, images, preset.train_vq, None)
        hinge = losses.discriminator_hinge(discriminator(images).float(), discriminator(out.images).float())
        limit = preset.train_vq.adaptive_weight_limit
        conv = tokenizer.decoder.conv_out
        weight = losses.adaptive_weight(out.features, conv, gradients[0], gradients[1], limit)
        codes = tokenizer.encode(images)
        again = tokenizer.decode(codes)
    for scalar in (loss.total, hinge, weight, out.losses["codebook"], out.losses["commitment"]):
        assert (scalar.device.type, scalar.dtype, scalar.shape) == ("cuda", torch.float32, ())
    assert (codes.device.type, codes.dtype, codes.shape) == ("cuda", torch.int64, (2, 16, 16, 4))
    assert (again.device.type, again.dtype, again.shape) == ("cuda", torch.float32, images.shape)


def test_scores_of_images_stay_on_the_device() -> None:
    a, b = torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    with NoWaiting():
        scores = [paired.psnr(a, b), paired.ssim(a, b, window=11)]
    assert all((score.device.type, score.shape) == ("cuda", (4,)) for score in scores)
