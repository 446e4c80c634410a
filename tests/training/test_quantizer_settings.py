"""The training settings of the quantizer in the training step, the plan, the checkpoint and the weight file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from movq_cli import checkpoints
from movq_cli.commands import train_vq
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.settings import Preset
from movq_cli.training import loop
from movq_cli.training.vq import TokenizerTraining
from movq_cli.training_settings import TrainVQSettings

CPU = torch.device("cpu")


def changed(tiny: Preset, vq: dict[str, Any], train: dict[str, Any]) -> Preset:
    data = tiny.model_dump()
    return Preset.model_validate({**data, "vq": {**data["vq"], **vq}, "train_vq": {**data["train_vq"], **train}})


def steps(stage: TokenizerTraining, first: int, last: int) -> list[float]:
    batches, seen = stage.batches(first), []
    for step in range(first, last):
        torch.manual_seed(loop.step_seed(0, step))
        metrics = stage.step(next(batches), step)
        assert all(value.isfinite() for value in metrics.values())
        seen.append(metrics["loss"].item())
    return seen


FSQ = {"quantizer": "fsq", "fsq_levels": [4, 4]}
ENTROPY = {"entropy_weight": 0.1, "entropy_temperature": 1.0, "quantizer_gradient": "rotation"}


@pytest.mark.parametrize(
    ("vq", "train"),
    [
        ({}, {**ENTROPY, "codebook_learning_rate": 3e-3}),
        ({"quantizer": "simvq", "chunks": 8}, ENTROPY),
        ({**FSQ, "chunks": 8}, {"codebook_learning_rate": 3e-3}),
    ],
)
def test_a_run_resumes_bit_by_bit_and_its_weights_load(
    vq: dict[str, Any], train: dict[str, Any], tiny: Preset, prepared: PreparedSet, tmp_path: Path
) -> None:
    settings = changed(tiny, vq, train)
    first = TokenizerTraining(settings, prepared, CPU)
    steps(first, 0, 3)
    path = tmp_path / "state.pt"
    checkpoints.save_state(path, {name: part.state_dict() for name, part in first.parts().items()})
    expected = steps(first, 3, 6)
    second = TokenizerTraining(settings, prepared, CPU)
    state = checkpoints.load_state(path, CPU, "")
    for name, part in second.parts().items():
        part.load_state_dict(state[name])
    assert steps(second, 3, 6) == expected
    second.export(tmp_path / "weights.safetensors")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    loaded, own = checkpoints.load_tokenizer(tmp_path / "weights.safetensors"), second.tokenizer.exported
    codes = own.encode(images)
    assert torch.equal(loaded.encode(images), codes)
    assert torch.equal(loaded.decode(codes), own.decode(codes))
    plan = train_vq.plan(settings, prepared, CPU, 1)
    assert plan["parameters"]["total"] == sum(p.numel() for p in own.parameters())


def test_the_codebooks_own_rate_is_constant_while_the_others_follow_the_schedule(
    tiny: Preset, prepared: PreparedSet
) -> None:
    settings = changed(tiny, {}, {"codebook_learning_rate": 0.005, "warmup_steps": 4, "decay": "cosine"})
    stage = TokenizerTraining(settings, prepared, CPU)
    others, own = stage.tokenizer.optimizer.param_groups
    assert [id(one) for one in own["params"]] == [id(one) for one in stage.model.quantize.parameters()]
    assert len(others["params"]) + len(own["params"]) == len(list(stage.model.parameters()))
    seen = []
    for step in range(6):
        stage.tokenizer.update(step, torch.ones(()))
        seen.append((others["lr"], own["lr"]))
    assert [rate for _, rate in seen] == [0.005] * 6
    warmup = [settings.train_vq.learning_rate * step / 4 for step in (1, 2, 3, 4)]
    assert [rate for rate, _ in seen][:4] == pytest.approx(warmup)
    assert seen[5][0] < seen[4][0]


@pytest.mark.parametrize("train", [{"quantizer_gradient": "rotation"}, {"entropy_weight": 0.1}])
def test_what_a_quantizer_cannot_do_is_refused_in_the_plan(
    train: dict[str, Any], tiny: Preset, prepared: PreparedSet
) -> None:
    settings = changed(tiny, FSQ, train)
    with pytest.raises(BadRequestError, match="no distances"):
        train_vq.plan(settings, prepared, CPU, 1)
    with pytest.raises(BadRequestError, match="no distances"):
        TokenizerTraining(settings, prepared, CPU)


def test_defaults_are_those_of_the_paper() -> None:
    train = TrainVQSettings()
    assert train.quantizer_gradient == "straight-through"
    assert train.entropy_weight == 0
    assert train.codebook_learning_rate is None
