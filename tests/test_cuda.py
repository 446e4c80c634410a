"""Tests that need a CUDA device: it gives the results of the CPU, in the precision that the device is built for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from movq_cli import devices, presets
from movq_cli.data.shards import PreparedSet
from movq_cli.models import masked_prior, priors
from movq_cli.models.cuda_graphs import GraphRecorder
from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.models.quantizers.vector import VectorQuantizer
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset, SampleSettings
from movq_cli.training import cost
from movq_cli.training.trainable import COMPILED_FROM
from movq_cli.training.vq import TokenizerTraining

if TYPE_CHECKING:
    from tests.conftest import Movq

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda")


def test_codes_are_those_of_the_cpu_under_bf16_autocast() -> None:
    torch.manual_seed(0)
    quantize = VectorQuantizer(1024, 64)
    z = torch.randn(4, 256, 16, 16)
    expected = quantize.encode(z)
    with devices.autocast(CUDA, "bf16"):
        found = quantize.to(CUDA).encode(z.to(CUDA)).cpu()
    assert (found == expected).float().mean() > 0.999


def test_the_papers_tokenizer_gives_the_cpus_images(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Tokenizer(presets.load("ffhq").vq).eval()
    codes = torch.randint(0, 1024, (2, 16, 16, 4))
    expected = model.decode(codes)
    model = model.to(CUDA).to(memory_format=torch.channels_last)
    assert (model.decode(codes.to(CUDA)).cpu() - expected).abs().mean() < 2e-3  # TF32
    with devices.autocast(CUDA, "bf16"):
        assert (model.decode(codes.to(CUDA)).cpu() - expected).abs().mean() < 0.02
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert (model.decode(codes.to(CUDA)).cpu() - expected).abs().max() < 1e-3


def test_samples_on_the_device_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    preset = presets.load("digits")
    model = MaskedPrior(preset.prior, preset.vq.code_shape).eval()
    classes = torch.arange(10)
    expected = model.decode(range(10), classes, SampleSettings())
    found = model.to(CUDA).decode(range(10), classes.to(CUDA), SampleSettings()).cpu()
    assert (found == expected).float().mean() > 0.99


@pytest.mark.usefixtures("no_tf32")
def test_a_training_step_on_the_device_gives_the_cpus_loss(tiny: Preset, prepared: PreparedSet) -> None:
    losses = []
    for device in (torch.device("cpu"), CUDA):
        stage = TokenizerTraining(tiny, prepared, device)
        stage.model.load_state_dict(TokenizerTraining(tiny, prepared, torch.device("cpu")).model.state_dict())
        batches = stage.batches(0)
        losses.append([stage.step(next(batches), step)["loss"].item() for step in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.usefixtures("no_tf32")
def test_a_compiled_step_gives_the_losses_of_the_plain_one(tiny: Preset, prepared: PreparedSet) -> None:
    losses = []
    for compiled in (False, True):
        settings = tiny.train_vq.model_copy(update={"compile": compiled})
        stage = TokenizerTraining(tiny.model_copy(update={"train_vq": settings}), prepared, CUDA)
        batches = stage.batches(0)
        losses.append([stage.step(next(batches), step)["loss"].item() for step in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_long_training_is_compiled_and_a_short_one_is_not(tiny: Preset, prepared: PreparedSet) -> None:
    for steps in (COMPILED_FROM - 1, COMPILED_FROM):
        settings = tiny.train_vq.model_copy(update={"steps": steps})
        stage = TokenizerTraining(tiny.model_copy(update={"train_vq": settings}), prepared, CUDA)
        assert (stage.model._compiled_call_impl is not None) == (steps >= COMPILED_FROM)


def test_tensors_are_brought_while_the_next_one_is_made() -> None:
    made: list[int] = []

    def make(number: int) -> torch.Tensor:
        made.append(number)
        big = torch.randn(2048, 2048, device=CUDA)
        for _ in range(50):
            big = (big @ big).clamp(-1, 1)
        return big.new_full((1000, 1000), number)

    for number, tensor in enumerate(devices.copied_to_cpu(map(make, range(5)))):
        assert tensor.device.type == "cpu"
        assert (tensor == number).all()
        assert made == list(range(min(number + 2, 5)))


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the convolutions in float32, as the CPU does, instead of TF32, PyTorch's default on CUDA."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def strict() -> Iterator[Callable[[], None]]:
    """From its call to the end of the test, waiting for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_never_waits_for_the_device(
    tiny: Preset, prepared: PreparedSet, strict: Callable[[], None]
) -> None:
    settings = tiny.train_vq.model_copy(update={"compile": False, "accumulate": 2, "clip_norm": 1.0})
    stage = TokenizerTraining(tiny.model_copy(update={"train_vq": settings}), prepared, CUDA)
    batch = next(stage.batches(0))
    for step in range(7):
        if step == 1:  # the first one makes the optimisers' states
            strict()
        stage.step(batch, step)


def test_the_memory_of_a_step_is_about_what_was_estimated() -> None:
    preset = presets.load("ffhq", ["train_vq.batch_size=4", "train_vq.compile=false"])
    settings = preset.train_vq.model_copy(update={"perceptual_weight": 0.0, "adversarial_weight": 0.0})
    estimate = cost.of_tokenizer(preset.vq, settings, CUDA, 1).memory["activations"]
    model = Tokenizer(preset.vq).to(CUDA).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 256, 256, device=CUDA).to(memory_format=torch.channels_last)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with devices.autocast(CUDA, "auto"):
        out = model(images)
    held = (torch.cuda.memory_allocated() - before) / 2**30
    assert out.images.shape == images.shape
    assert held == pytest.approx(estimate, rel=0.3)


@pytest.mark.parametrize("mode", ["auto", "depth"])
def test_autoregressive_samples_on_the_device_are_those_of_the_cpu(mode: str) -> None:
    torch.manual_seed(0)
    preset = presets.load("digits", [f"prior.mode={mode}"])
    model = priors.build(preset.prior, preset.vq.code_shape).eval()
    classes = torch.arange(10)
    expected = model.decode(range(10), classes, SampleSettings())
    found = model.to(CUDA).decode(range(10), classes.to(CUDA), SampleSettings()).cpu()
    assert (found == expected).float().mean() > 0.95


def test_a_recorded_step_is_what_was_run_before_and_is_called_no_more() -> None:
    recorder, number, called = GraphRecorder(), torch.zeros(1, device=CUDA), []
    recorder.reuse("sums", [number], lambda: None)

    def step(by: int) -> None:
        called.append(by)
        number.add_(by * (torch.arange(4, device=CUDA) <= 1).sum())

    for _ in range(5):
        recorder.run("one", partial(step, 1))
        recorder.run("ten", partial(step, 10))
    assert number.item() == 5 * 2 * 11
    assert called == [1, 10, 1, 10]


@pytest.mark.parametrize("mode", ["mask", "auto", "depth"])
def test_the_same_seeds_draw_the_same_codes_again(mode: str) -> None:
    torch.manual_seed(0)
    preset = presets.load("ffhq", [f"prior.mode={mode}", "prior.layers=4"])
    model = priors.build(preset.prior, preset.vq.code_shape).to(CUDA).eval()
    devices.cast_linear_layers(model, CUDA, "bf16")
    with devices.autocast(CUDA, "bf16"):
        first, *others = (model.decode(range(6), None, SampleSettings()) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("mode", ["auto", "depth"])
def test_recorded_steps_draw_the_codes_of_plain_ones(
    mode: str, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    preset = presets.load("ffhq", [f"prior.mode={mode}", "prior.classes=10", "prior.layers=4"])
    model = priors.build(preset.prior, preset.vq.code_shape).to(CUDA).eval()
    devices.cast_linear_layers(model, CUDA, "bf16")
    labels, sample = torch.arange(6, device=CUDA), SampleSettings(guidance=guidance, guidance_schedule="linear")
    seeds = range(6), range(10, 16), range(6)  # the second and third find their steps recorded
    with devices.autocast(CUDA, "bf16"):
        found = [model.decode(each, labels, sample) for each in seeds]
        monkeypatch.setattr(GraphRecorder, "run", lambda self, kind, step: step())
        expected = [model.decode(each, labels, sample) for each in seeds]
    assert all(map(torch.equal, found, expected))
    assert len(expected[0].unique()) > 500


@pytest.mark.parametrize("mode", ["auto", "depth"])
def test_compiled_steps_are_recorded_too(mode: str) -> None:
    torch.manual_seed(0)
    preset = presets.load("ffhq", [f"prior.mode={mode}", "prior.layers=4"])
    model = priors.build(preset.prior, preset.vq.code_shape).to(CUDA).eval()
    devices.cast_linear_layers(model, CUDA, "bf16")
    codes = torch.randint(0, 1024, (4, *preset.vq.code_shape.size), device=CUDA)
    codes[:, 8:] = model.unknown
    with devices.autocast(CUDA, "bf16"):
        expected = copy.deepcopy(model).decode(range(4), None, SampleSettings(), codes)  # so that nothing is recorded
        model.compile_blocks()
        for _ in range(2):
            found = model.decode(range(4), None, SampleSettings(), codes)
            assert torch.equal(found[:, :8], codes[:, :8])
            # bf16 rounds otherwise in compiled kernels, which moves a code drawn from 1,024 almost equal ones by a few
            # places; two independent draws are 340 places apart on average.
            assert (found - expected).abs().float().mean() < 10


def test_compiled_blocks_give_the_logits_of_plain_ones() -> None:
    torch.manual_seed(0)
    preset = presets.load("ffhq", ["prior.layers=4"])
    model = MaskedPrior(preset.prior, preset.vq.code_shape).to(CUDA).eval()
    codes = torch.randint(0, 1025, (9, 16, 16, 4), device=CUDA)
    with torch.inference_mode():
        expected = model(codes)
        model.compile_blocks()
        for batch in (9, 1, 4):
            torch.testing.assert_close(model(codes[:batch]), expected[:batch], atol=2e-2, rtol=2e-2)
        drawn = model.decode(range(4), None, SampleSettings())
    assert ((drawn >= 0) & (drawn < 1024)).all()


def test_an_image_is_the_same_in_a_last_batch_that_is_not_full(trained_once: Path, tmp_path: Path, movq: Movq) -> None:
    prior = trained_once / "runs" / "tiny-prior"
    for count in (5, 8):
        movq("sample", f"{count}", "-n", count, "--batch-size", 4, "--run", prior, "--device", "cuda")
    for index in range(5):
        name = f"{index:06d}.png"
        assert (tmp_path / "5" / name).read_bytes() == (tmp_path / "8" / name).read_bytes()
    assert len(list((tmp_path / "5").glob("*.png"))) == 5


def test_the_papers_prior_learns_in_bf16() -> None:
    preset = presets.load("ffhq")
    torch.manual_seed(0)
    model = MaskedPrior(preset.prior, preset.vq.code_shape).to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    codes = torch.randint(0, 1024, (8, 16, 16, 4), device=CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    seen = []
    for _ in range(30):
        mask = masked_prior.training_mask(codes.shape, generator)
        with devices.autocast(CUDA, "bf16"):
            logits = model(codes.masked_fill(mask, model.unknown))
        loss = masked_prior.masked_loss(logits, codes, mask, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0] - 0.3
