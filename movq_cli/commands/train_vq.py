"""`movq train-vq`: train a tokenizer on a prepared set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from movq_cli import devices, presets, runs
from movq_cli.commands import training
from movq_cli.console import Console
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset
from movq_cli.training.vq import TokenizerTraining


def train_vq(
    *,
    preset: str,
    overrides: Sequence[str],
    run: Path | None,
    device: str | None,
    weights: Path | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Train stage 1.

    Args:
        preset: Name or path.
        overrides: Dotted settings.
        run: Run folder; None = `runs/PRESET-vq`.
        device: Name; None = CUDA where there is one.
        weights: Folder with VGG's weights, for the perceptual loss; None = torch hub's.
        dry_run: Only print the plan; needs no data.
        console: Where to speak.
    """
    settings = presets.load(preset, overrides)
    if dry_run:
        training.show_plan(plan(settings), console)
        return
    images = training.open_images(settings, preset, console)
    stage = TokenizerTraining(settings, images, devices.pick(device), weights)
    place = training.run_folder(run, preset, "vq")
    manifest = runs.begin(place, preset=preset, settings=settings, steps=stage.steps, data=images.manifest.hash)
    console.log(
        f"train-vq {preset}: {training.parameters(stage.model)['total']:,} parameters on {stage.device}, "
        f"{len(stage.training_split):,} images, {stage.steps:,} steps of {settings.train_vq.batch_size}, "
        f"to {place.folder}"
    )
    if stage.discriminator is not None and stage.discriminator_start >= stage.steps:
        console.warn(
            f"the discriminator starts at step {stage.discriminator_start:,}, but the run ends at {stage.steps:,}: "
            "it will never train. Set train_vq.discriminator_start, to 50% say."
        )
    training.train(stage, place, manifest, console)


def plan(settings: Preset) -> dict[str, Any]:
    """What training these settings would do: parameters by part, steps (null where they depend on the data)."""
    with torch.device("meta"):
        model = Tokenizer(settings.vq)
        discriminator = PatchDiscriminator(
            settings.train_vq.discriminator_channels, settings.train_vq.discriminator_layers
        )
    return {
        "parameters": training.parameters(model),
        "discriminator": training.parameters(discriminator)["total"],
        "steps": settings.train_vq.steps,
        "epochs": settings.train_vq.epochs,
        "batch_size": settings.train_vq.batch_size,
        "learning_rate": settings.train_vq.learning_rate,
    }
