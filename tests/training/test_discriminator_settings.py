"""The settings with which a discriminator stays informative: steps of its own, a rate of its own, a limited weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from movq_cli.data.shards import PreparedSet
from movq_cli.settings import Preset
from movq_cli.training.vq import TokenizerTraining

CPU = torch.device("cpu")


def stage_with(tiny: Preset, prepared: PreparedSet, **changes: object) -> TokenizerTraining:
    return TokenizerTraining(
        tiny.model_copy(update={"train_vq": tiny.train_vq.model_copy(update=changes)}), prepared, CPU
    )


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def are_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_the_discriminator_is_trained_in_its_warmup_while_the_tokenizer_is_trained_as_without_it(
    tiny: Preset, prepared: PreparedSet
) -> None:
    with_warmup = stage_with(tiny, prepared, discriminator_start=4, discriminator_warmup=2)
    without = stage_with(tiny, prepared, adversarial_weight=0.0)
    assert with_warmup.discriminator is not None
    discriminator = with_warmup.discriminator.model
    batches = with_warmup.batches(0)
    for step in range(5):
        before, batch = weights(discriminator), next(batches)
        torch.manual_seed(step)
        metrics = with_warmup.step(batch, step)
        torch.manual_seed(step)
        without.step(batch, step)
        assert ("discriminator" in metrics) == (step >= 2)
        assert ("adaptive_weight" in metrics) == (step >= 4)
        assert are_equal(before, weights(discriminator)) == (step < 2)
        assert are_equal(weights(with_warmup.model), weights(without.model)) == (step < 4)


def test_a_warmup_longer_than_the_time_before_the_start_begins_at_step_0(tiny: Preset, prepared: PreparedSet) -> None:
    stage = stage_with(tiny, prepared, discriminator_start=2, discriminator_warmup=100)
    metrics = stage.step(next(stage.batches(0)), 0)
    assert "discriminator" in metrics
    assert "adaptive_weight" not in metrics


@pytest.mark.parametrize("rate", [None, 1e-3])
def test_the_discriminator_has_a_learning_rate_of_its_own(
    tiny: Preset, prepared: PreparedSet, rate: float | None
) -> None:
    stage = stage_with(
        tiny, prepared, discriminator_start=0, discriminator_learning_rate=rate, warmup_steps=4, decay="none"
    )
    assert stage.discriminator is not None
    own = stage.settings.learning_rate
    for step, factor in enumerate((0.25, 0.5)):
        stage.step(next(stage.batches(step)), step)
        for optimizer, expected in (
            (stage.tokenizer.optimizer, own),
            (stage.discriminator.optimizer, own if rate is None else rate),
        ):
            assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(factor * expected)]


def test_the_adversarial_gradient_has_the_limited_weight(tiny: Preset, prepared: PreparedSet) -> None:
    free = stage_with(tiny, prepared, discriminator_start=0)
    batch = next(free.batches(0))
    weight = free.step(batch, 0)["adaptive_weight"].item()
    limited = stage_with(tiny, prepared, discriminator_start=0, adaptive_weight_limit=weight / 4)
    assert limited.step(batch, 0)["adaptive_weight"].item() == pytest.approx(weight / 4)
    # A quarter of the weight has the effect of a quarter of the setting adversarial_weight.
    quarter = stage_with(tiny, prepared, discriminator_start=0, adversarial_weight=tiny.train_vq.adversarial_weight / 4)
    quarter.step(batch, 0)
    for one, other in zip(weights(limited.model), weights(quarter.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
