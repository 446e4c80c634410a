"""What regularizes the discriminator, against loops in float64: LeCam."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from movq_cli import checkpoints
from movq_cli.data.shards import PreparedSet
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.settings import Preset
from movq_cli.training import loop, losses
from movq_cli.training.adversary import Adversary
from movq_cli.training.logit_averages import DECAY, LogitAverages
from movq_cli.training.trainable import Trainable
from movq_cli.training.vq import TokenizerTraining
from movq_cli.training_settings import TrainVQSettings

CPU = torch.device("cpu")


def adversary_with(ranks: Ranks = SINGLE_PROCESS, **changes: Any) -> Adversary:
    """Return a small discriminator in training, beside which there is no tokenizer."""
    values = {"batch_size": 4, "discriminator_channels": 4, "discriminator_layers": 1, "precision": "float32"}
    settings = TrainVQSettings(**values, **changes)
    torch.manual_seed(0)
    model = PatchDiscriminator(**settings.discriminator_layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=settings.betas, fused=True)
    trained = Trainable(model, optimizer, settings, 10, ranks, average=False, learning_rate=1e-3)
    return Adversary(trained, settings, 0, CPU)


def step(adversary: Adversary, index: int) -> Mapping[str, float]:
    """Train a discriminator for one step on images of a generator, which the index seeds."""
    images = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(index)) * 2 - 1
    torch.manual_seed(index)
    adversary.discriminator.clear()
    metrics = adversary.backward(images[0], images[1], 1.0)
    adversary.update(index, metrics, torch.ones(()))
    return {name: value.item() for name, value in metrics.items()}


def weights(adversary: Adversary) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in adversary.discriminator.model.parameters()])


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


ALL = {"lecam_weight": 0.5}


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
