"""What the training of a tokenizer says on its way: the terms of its loss, its discriminator, and its best weights."""

from __future__ import annotations

import pytest
import torch

from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.settings import Preset
from movq_cli.training.vq import TokenizerTraining
from movq_cli.training_settings import TrainVQSettings

CPU = torch.device("cpu")


def stage_with(tiny: Preset, prepared: PreparedSet, **changes: object) -> TokenizerTraining:
    settings = TrainVQSettings.model_validate({**tiny.train_vq.model_dump(), **changes})
    return TokenizerTraining(tiny.model_copy(update={"train_vq": settings}), prepared, CPU)


def test_the_formula_of_the_loss_is_the_logged_loss(tiny: Preset, prepared: PreparedSet) -> None:
    stage = stage_with(tiny, prepared, l1_weight=0.5, l2_weight=2.0, discriminator_start=0)
    formula, _, adversarial = stage.loss_formula.partition("; ")
    metrics = {name: value.item() for name, value in stage.step(next(stage.batches(0)), 0).items()}
    metrics["commitment"] = metrics["codebook"]
    terms = [term.split() for term in formula.split(" + ")]
    assert [name for _, name in terms] == ["l1", "l2", "codebook", "commitment"]
    assert sum(float(weight) * metrics[name] for weight, name in terms) == pytest.approx(metrics["loss"], rel=1e-3)
    assert adversarial == "the decoder also minimizes 0.8 adaptive_weight generator from step 0 on"
    assert ";" not in stage_with(tiny, prepared, adversarial_weight=0.0).loss_formula


def test_the_log_says_when_the_discriminator_begins(tiny: Preset, prepared: PreparedSet) -> None:
    stage = stage_with(tiny, prepared, discriminator_start=6, discriminator_warmup=2, discriminator_ramp=3)
    events = {step: stage.event(step) for step in range(10) if stage.event(step)}
    assert events == {
        4: "the discriminator's training begins, 2 steps before its loss",
        6: "the adversarial loss begins, and has its full weight 3 steps later",
    }
    assert stage.milestones == {4}
    for changes in ({"adversarial_weight": 0.0}, {"discriminator_start": 10}, {"discriminator_start": 0}):
        assert stage_with(tiny, prepared, **changes).milestones == frozenset()


def test_a_discriminator_that_distinguishes_nothing_is_warned_of_once_it_has_settled(
    tiny: Preset, prepared: PreparedSet
) -> None:
    stage = stage_with(tiny, prepared, discriminator_start=4, discriminator_ramp=2, log_every=1)
    lost, informative = {"logits_real": 0.11, "logits_fake": 0.12}, {"logits_real": 0.3, "logits_fake": -0.1}
    assert stage.warning(6, lost) is None
    text = stage.warning(7, lost)
    assert text is not None
    assert "0.11 for images and 0.12 for reconstructions" in text
    assert "--from RUN@STEP" in text
    for name in ("discriminator_warmup", "discriminator_learning_rate", "adaptive_weight_limit"):
        assert name in text
        assert name in TrainVQSettings.model_fields
    assert stage.warning(7, informative) is None
    assert stage.warning(7, {"l1": 0.1}) is None


def test_a_metric_of_the_best_weights_that_is_not_computed_is_refused(
    tiny: Preset, prepared: PreparedSet, offline: None
) -> None:
    assert stage_with(tiny, prepared).criterion.metric == "psnr"
    with pytest.raises(BadRequestError, match=r"best_by is lpips, which is not computed here.*movq weights --fetch"):
        stage_with(tiny, prepared, best_by="lpips")
    with pytest.raises(ValueError, match="set evaluate_every"):
        stage_with(tiny, prepared, best_by="rfid")
