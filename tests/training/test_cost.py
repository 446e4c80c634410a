"""The estimated cost of a step, against what real forward passes save and compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from movq_cli import presets
from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset
from movq_cli.training import cost

CPU = torch.device("cpu")


def saved_gib(model: nn.Module, *inputs: Tensor) -> float:
    """Return the memory in GiB that a real forward pass saves for its backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Tensor] = {}

    def record(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(*inputs)
    return sum(t.untyped_storage().nbytes() for address, t in storages.items() if address not in weights) / 2**30


def larger(tiny: Preset, **changes: object) -> Preset:
    """Return the tiny preset at a size whose memory is not a rounding error, without discriminator and LPIPS."""
    update = {"adversarial_weight": 0.0, "batch_size": 16, "revive_every": 0}
    return tiny.model_copy(
        update={
            "vq": tiny.vq.model_copy(update={"resolution": 64}),
            "train_vq": tiny.train_vq.model_copy(update=update | changes),
            "train_prior": tiny.train_prior.model_copy(update={"batch_size": 64} | changes),
        }
    )


@pytest.mark.slow
def test_activations_of_a_tokenizer_are_those_that_a_forward_pass_saves(tiny: Preset) -> None:
    preset = larger(tiny)
    estimate = cost.of_tokenizer(preset.vq, preset.train_vq, CPU, 1).memory
    images = torch.zeros(16, 3, 64, 64)
    assert estimate["activations"] == pytest.approx(saved_gib(Tokenizer(preset.vq), images), abs=0.011)
    assert estimate["activations"] > 0.1


def test_activations_of_a_prior_are_those_that_a_forward_pass_and_its_loss_save(tiny: Preset) -> None:
    preset = larger(tiny)
    shape = preset.vq.code_shape
    model = MaskedPrior(preset.prior, shape)
    codes, classes = torch.zeros(64, 32, 32, 4, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    estimate = cost.of_prior(preset.prior, shape, preset.train_prior, CPU, 1).memory
    logits = 4 * 64 * 32 * 32 * 4 * 16 / 2**30
    assert estimate["activations"] == pytest.approx(saved_gib(model, codes, classes) + logits, rel=0.15)


@pytest.mark.slow
def test_settings_that_save_memory_lower_the_estimate(tiny: Preset) -> None:
    def activations(ranks: int = 1, **changes: object) -> float:
        preset = larger(tiny, **changes)
        return cost.of_tokenizer(preset.vq, preset.train_vq, CPU, ranks).memory["activations"]

    full = activations()
    assert activations(ranks=2) == pytest.approx(full / 2, abs=0.02)
    assert activations(accumulate=4) == pytest.approx(full / 4, abs=0.02)
    assert activations(activation_checkpointing=True) < 0.7 * full
    assert activations(precision="bf16") < 0.9 * full
    assert activations(perceptual_weight=1.0) > full
    assert activations(adversarial_weight=0.8, discriminator_channels=64) > full


@pytest.mark.slow
def test_weights_gradients_moments_and_average_are_counted(tiny: Preset) -> None:
    preset = larger(tiny)
    wide = preset.vq.model_copy(update={"codebook_size": 65536})
    estimate = cost.of_tokenizer(wide, preset.train_vq.model_copy(update={"ema_decay": 0.9}), CPU, 1).memory
    weights = 4 * sum(parameter.numel() for parameter in Tokenizer(wide).parameters()) / 2**30
    for part, times in (("weights", 1), ("gradients", 1), ("optimizer", 2), ("average", 1)):
        assert estimate[part] == pytest.approx(times * weights, abs=0.006)
    assert estimate["total"] == pytest.approx(sum(v for k, v in estimate.items() if k != "total"), abs=0.03)


@pytest.mark.slow
def test_the_papers_prior_has_the_known_arithmetic() -> None:
    """A forward pass of the masked prior is 164 GFLOP an image: blocks, attention, head."""
    preset = presets.load("ffhq")
    one = preset.train_prior.model_copy(update={"batch_size": 1})
    flops = cost.of_prior(preset.prior, preset.vq.code_shape, one, CPU, 1).flops
    blocks = 24 * (2 * 256 * 12 * 1024**2 + 4 * 256**2 * 1024)
    assert flops == 3 * (blocks + 2 * 256 * 1024 * 4096)
    assert flops / 3 == pytest.approx(164e9, rel=0.01)


@pytest.mark.slow
def test_arithmetic_is_that_of_a_real_step(tiny: Preset) -> None:
    preset = larger(tiny, precision="float32")
    model, images = Tokenizer(preset.vq), torch.zeros(16, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(images).images.sum().backward()
    estimate = cost.of_tokenizer(preset.vq, preset.train_vq, CPU, 1).flops
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.05)  # The images need no gradient.
    with_losses = larger(tiny, adversarial_weight=0.8, perceptual_weight=1.0)
    assert cost.of_tokenizer(with_losses.vq, with_losses.train_vq, CPU, 1).flops > 1.1 * estimate
    halves = larger(tiny, precision="float32", accumulate=2)
    assert cost.of_tokenizer(halves.vq, halves.train_vq, CPU, 1).flops == pytest.approx(estimate, rel=1e-3)


@pytest.mark.slow
def test_lpips_has_the_parameters_of_the_library() -> None:
    import lpips

    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    assert cost.lpips_parameters() == sum(parameter.numel() for parameter in network.parameters())
