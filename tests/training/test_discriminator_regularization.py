"""What regularizes the discriminator, against loops in float64: LeCam, the penalty on its gradients, augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from movq_cli import checkpoints
from movq_cli.data.shards import PreparedSet
from movq_cli.models import augmentation
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.settings import Preset
from movq_cli.training import cost, loop, losses
from movq_cli.training.adversary import Adversary
from movq_cli.training.logit_averages import DECAY, LogitAverages
from movq_cli.training.trainable import Trainable
from movq_cli.training.vq import TokenizerTraining
from movq_cli.training_settings import TrainVQSettings
from tests.conftest import on_ranks

CPU = torch.device("cpu")


def adversary_with(ranks: Ranks = SINGLE_PROCESS, **changes: Any) -> Adversary:
    """Return a small discriminator in training, beside which there is no tokenizer."""
    values = {"batch_size": 4, "discriminator_channels": 4, "discriminator_layers": 1, "precision": "float32"}
    settings = TrainVQSettings(**{**values, **changes})
    torch.manual_seed(0)
    model = PatchDiscriminator(**settings.discriminator_layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=settings.betas, fused=True)
    trained = Trainable(model, optimizer, settings, 10, ranks, average=False, learning_rate=1e-3)
    return Adversary(trained, settings, 0, CPU)


def step(adversary: Adversary, index: int) -> Mapping[str, float]:
    """Train a discriminator for one step on images of a generator, which the index seeds."""
    images = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(index)) * 2 - 1
    torch.manual_seed(index)
    adversary.begin(index)
    originals, reconstructions = images[:, adversary.discriminator.ranks.share(4)]
    metrics = adversary.backward(originals, reconstructions, 1.0)
    adversary.update(index, metrics, torch.ones(()))
    return {name: value.item() for name, value in metrics.items()}


def parameters(adversary: Adversary) -> Iterator[nn.Parameter]:
    return adversary.discriminator.model.parameters()


def weights(adversary: Adversary) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters(adversary)])


def test_lecam_is_the_mean_squared_excess_of_each_logit_over_the_average_of_the_others() -> None:
    torch.manual_seed(0)
    real, fake = (torch.randn(3, 1, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = losses.lecam(real, fake, torch.tensor(0.3, dtype=torch.float64), torch.tensor(-0.2, dtype=torch.float64))
    loss.backward()
    total = 0.0
    excesses: list[tuple[Tensor, Callable[[float], float], int]] = [
        (real, lambda value: value + 0.2, 1),
        (fake, lambda value: 0.3 - value, -1),
    ]
    for logits, excess, sign in excesses:
        assert logits.grad is not None
        for value, gradient in zip(logits.flatten().tolist(), logits.grad.flatten().tolist(), strict=True):
            positive = max(0.0, excess(value))
            total += positive**2 / logits.numel()
            assert gradient == pytest.approx(sign * 2 * positive / logits.numel())
    assert loss.item() == pytest.approx(total)


def test_the_averages_have_no_bias_of_their_start_and_skip_steps_that_are_not_finite() -> None:
    averages = LogitAverages()
    one = torch.randn(4, requires_grad=True)
    losses.lecam(one, one, averages.real, averages.fake).backward()
    assert one.grad is not None
    assert not one.grad.any()  # There is no penalty before there are averages.
    means = torch.randn(20, 2, dtype=torch.float64)
    for index, (real, fake) in enumerate(means):
        averages.update(real, fake, torch.ones(()))
        averages.update(torch.tensor(torch.nan), fake, torch.zeros(()))
        shares = torch.tensor([DECAY**age for age in reversed(range(index + 1))], dtype=torch.float64)
        expected = (shares[:, None] * means[: index + 1]).sum(0) / shares.sum()
        assert averages.real.item() == pytest.approx(expected[0].item(), rel=1e-4)
        assert averages.fake.item() == pytest.approx(expected[1].item(), rel=1e-4)


def test_the_regularization_of_a_step_uses_the_averages_before_it() -> None:
    adversary = adversary_with(lecam_weight=0.5)
    first, second = step(adversary, 0), step(adversary, 1)
    assert first["lecam"] == 0.0
    assert second["lecam"] > 0.0
    assert adversary.averages is not None
    expected = (DECAY * first["logits_real"] + second["logits_real"]) / (DECAY + 1)
    assert adversary.averages.real.item() == pytest.approx(expected, rel=1e-4)
    free = adversary_with()
    assert step(free, 0)["logits_real"] == first["logits_real"]
    assert "lecam" not in step(free, 1)
    assert not torch.equal(weights(free), weights(adversary))


class Probe(nn.Module):
    """A smooth discriminator of patches of 4 x 4 pixels."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 4, stride), nn.Tanh(), nn.Conv2d(5, 1, 1)).double()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def squared_norm_of_a_logits_gradient(model: nn.Module, images: Tensor) -> float:
    """Return the mean over images and patches of |grad D|^2, from central differences of each logit by each pixel."""
    total, width = 0.0, 1e-5
    for image, one in enumerate(images):
        for index in range(one.numel()):
            shift = torch.zeros_like(one).view(-1)
            shift[index] = width
            above, below = (model(images[image : image + 1] + sign * shift.view(one.shape)) for sign in (1, -1))
            total += ((above - below) / (2 * width)).square().sum().item()
    return total / model(images).numel()


def test_the_gradient_penalty_is_that_of_the_published_equation_on_patches() -> None:
    torch.manual_seed(0)
    model, images = Probe(stride=4), torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    penalty = losses.gradient_penalty(model(images), images)
    assert penalty.item() == pytest.approx(squared_norm_of_a_logits_gradient(model, images.detach()), rel=1e-6)
    penalty.backward()
    weight = model.layers[0].get_parameter("weight")
    assert weight.grad is not None
    # The gradient that trains the discriminator, by central differences of the penalty.
    for index in ((0, 0, 0, 0), (3, 2, 1, 3)):
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * 1e-6
            moved = images.detach().requires_grad_()
            found.append(losses.gradient_penalty(model(moved), moved).item())
            with torch.no_grad():
                weight[index] -= sign * 1e-6
        assert weight.grad[index].item() == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-4)


def test_an_image_of_one_patch_has_the_penalty_of_an_ordinary_discriminator() -> None:
    torch.manual_seed(0)
    model, images = Probe(stride=1), torch.randn(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = squared_norm_of_a_logits_gradient(model, images.detach())
    assert losses.gradient_penalty(model(images), images).item() == pytest.approx(expected, rel=1e-6)


def test_the_penalty_comes_every_few_steps_with_as_many_times_the_weight() -> None:
    lazy, often = adversary_with(r1_weight=4, r1_every=2), adversary_with(r1_weight=8, r1_every=1)
    free = adversary_with()
    gradients = []
    for adversary in (lazy, often, free):
        first = step(adversary, 0)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters(adversary) if p.grad is not None]))
        assert ("r1" in first) == (adversary is not free)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
    assert "r1" not in step(lazy, 1)
    assert "r1" in step(often, 1)


def test_the_penalty_is_in_float32_while_the_losses_are_not() -> None:
    exact, rounded = (adversary_with(r1_weight=1, precision=precision) for precision in ("float32", "bf16"))
    one, other = step(exact, 0), step(rounded, 0)
    assert one["r1"] == other["r1"] > 0
    assert one["discriminator"] != other["discriminator"]


def test_a_compiled_discriminator_has_the_penalty_of_an_uncompiled_one() -> None:
    adversary, compiled = adversary_with(r1_weight=1), adversary_with(r1_weight=1)
    compiled.discriminator.model.compile(backend="aot_eager")  # It has no second derivatives, like the default one.
    expected, found = step(adversary, 0), step(compiled, 0)
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weights(compiled), weights(adversary))


def test_the_cost_has_the_penalty_of_every_few_steps(tiny: Preset) -> None:
    def of(**changes: Any) -> cost.Cost:
        train = tiny.train_vq.model_copy(update={"discriminator_channels": 64, "batch_size": 256, **changes})
        return cost.of_tokenizer(tiny.vq, train, CPU, 1)

    without, often, lazy = of(), of(r1_weight=1.0, r1_every=1), of(r1_weight=1.0, r1_every=4)
    assert lazy.flops - without.flops == pytest.approx((often.flops - without.flops) / 4, rel=1e-6)
    assert often.memory["activations"] == lazy.memory["activations"] > without.memory["activations"]
    model, images = PatchDiscriminator(64, 1), torch.randn(2, 3, 16, 16, requires_grad=True).view(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        losses.gradient_penalty(model(images), images).backward()
    assert often.flops - without.flops == pytest.approx(counter.get_total_flops() * 128, rel=0.25)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_pass_of_a_step_has_augmentations_of_its_own_that_do_not_depend_on_the_parts(accumulate: int) -> None:
    adversary = adversary_with(discriminator_augmentation=("color",), accumulate=accumulate)
    images = torch.rand(4, 3, 16, 16)
    seen: list[Tensor] = []
    adversary.discriminator.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    torch.manual_seed(5)
    adversary.begin(0)
    last, features = nn.Conv2d(2, 3, 3, padding=1), torch.randn(4, 2, 16, 16)
    for part in range(accumulate):
        own = images.chunk(accumulate)[part]
        own_features = features.chunk(accumulate)[part]
        adversary.gradient(own.clone().requires_grad_(), own_features, last, torch.ones_like(own), part)
        adversary.backward(own, own, 1 / accumulate, part)
    torch.manual_seed(5)
    numbers = torch.rand(3, 4, augmentation.NUMBERS)
    for use in range(3):
        found = torch.cat([seen[3 * part + use] for part in range(accumulate)])
        torch.testing.assert_close(found, augmentation.augment(images, ("color",), numbers[use]))
    assert not torch.equal(seen[1], seen[2])


def test_the_gradient_of_the_decoder_passes_back_through_its_augmentation() -> None:
    adversary = adversary_with(discriminator_augmentation=("cutout",), adaptive_weight_limit=1.0)
    images, last = torch.rand(4, 3, 16, 16, requires_grad=True), nn.Conv2d(2, 3, 3, padding=1)
    adversary.begin(0)
    gradient, _ = adversary.gradient(images, torch.randn(4, 2, 16, 16), last, torch.ones_like(images))
    assert adversary._numbers is not None
    visible = augmentation.augment(torch.ones_like(images), ("cutout",), adversary._numbers[0]).bool()
    assert not gradient[~visible].any()
    assert gradient[visible].abs().max() > 0


ALL = {
    "lecam_weight": 0.5,
    "r1_weight": 1.0,
    "r1_every": 2,
    "discriminator_augmentation": ("color", "translation", "cutout"),
}


def three_steps(ranks: Ranks, changes: dict[str, Any]) -> tuple[list[dict[str, float]], Tensor, Tensor]:
    """Train a discriminator; return the metrics of all ranks, the averages of the logits, and the weights."""
    adversary = adversary_with(ranks, **changes)
    seen = [
        {name: ranks.mean(torch.tensor(value)).item() for name, value in step(adversary, index).items()}
        for index in range(3)
    ]
    assert adversary.averages is not None
    return seen, torch.stack([adversary.averages.real, adversary.averages.fake]), weights(adversary)


def test_two_ranks_train_the_regularized_discriminator_as_one_process_does(tmp_path: Path) -> None:
    metrics, averages, trained = three_steps(SINGLE_PROCESS, ALL)
    both = on_ranks(three_steps, ALL, tmp_path, world=2)
    for found, others, model in both:
        for one, expected in zip(found, metrics, strict=True):
            assert one == pytest.approx(expected, rel=1e-3)
        torch.testing.assert_close(others, averages, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model, trained, rtol=1e-3, atol=2e-4)
    assert torch.equal(both[0][1], both[1][1])
    assert torch.equal(both[0][2], both[1][2])


def test_a_resumed_run_with_all_of_them_equals_an_uninterrupted_one(
    tiny: Preset, prepared: PreparedSet, tmp_path: Path
) -> None:
    train = tiny.train_vq.model_copy(update={"discriminator_start": 1, "batch_size": 4, "accumulate": 2, **ALL})
    settings = tiny.model_copy(update={"train_vq": train})

    def steps(stage: TokenizerTraining, first: int, last: int) -> list[dict[str, float]]:
        batches, seen = stage.batches(first), []
        for index in range(first, last):
            torch.manual_seed(loop.step_seed(0, index))
            seen.append({name: value.item() for name, value in stage.step(next(batches), index).items()})
        return seen

    whole, resumed = (TokenizerTraining(settings, prepared, CPU) for _ in range(2))
    steps(whole, 0, 2)
    checkpoints.save_state(tmp_path / "state.pt", {name: part.state_dict() for name, part in whole.parts().items()})
    expected = steps(whole, 2, 4)
    stored = checkpoints.load_state(tmp_path / "state.pt", CPU, "")
    for name, part in resumed.parts().items():
        part.load_state_dict(stored[name])
    assert steps(resumed, 2, 4) == expected
    assert whole.adversary is not None
    assert resumed.adversary is not None
    assert torch.equal(weights(resumed.adversary), weights(whole.adversary))
