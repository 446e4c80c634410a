"""Fine-tuning with a discriminator of the stored layout, and of another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from movq_cli import presets
from movq_cli.commands import fine_tuning
from movq_cli.data.shards import PreparedSet
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset
from movq_cli.training.initial_weights import InitialWeights
from movq_cli.training.vq import TokenizerTraining


@pytest.mark.parametrize("given", [[], ["train_vq.discriminator_norm=none"], ["train_vq.discriminator_channels=4"]])
def test_a_stored_discriminator_is_used_unless_the_user_gives_another_layout(
    given: list[str], tiny: Preset, tiny_yaml: Path, prepared: PreparedSet
) -> None:
    stored = PatchDiscriminator(8, 2, "group", blur=True)
    initial = InitialWeights(Path("weights"), (), Tokenizer(tiny.vq), stored)
    settings = presets.load(str(tiny_yaml), fine_tuning.overrides(initial, str(tiny_yaml), given))
    assert settings.train_vq.discriminator_layers == 2
    assert settings.train_vq.discriminator_blur
    assert (settings.train_vq.discriminator_warmup > 0) == bool(given)
    stage = TokenizerTraining(settings, prepared, torch.device("cpu"))
    stage.start_from(initial)
    assert stage.discriminator is not None
    found = stage.discriminator.model.main[0].get_parameter("weight")
    is_stored = found.shape == stored.main[0].get_parameter("weight").shape and torch.equal(
        found, stored.main[0].get_parameter("weight")
    )
    assert is_stored == (not given)
