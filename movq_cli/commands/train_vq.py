"""`movq train-vq`: train a tokenizer on a prepared set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from movq_cli import devices, presets, ranks, runs
from movq_cli.commands import training
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset
from movq_cli.training import cost
from movq_cli.training.vq import TokenizerTraining


def train_vq(
    *,
    preset: str,
    overrides: Sequence[str],
    run: Path | None,
    device: str | None,
    gpus: int | None,
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
        gpus: Processes to start, one a GPU; None = this one alone, or those that torchrun has started.
        weights: Folder with VGG's and AlexNet's weights, for LPIPS, and Inception's, for rFID; None = torch hub's.
        dry_run: Only print the plan; needs no data.
        console: Where to speak.
    """
    settings = presets.load(preset, overrides)
    if dry_run:
        found = training.find_images(settings)
        training.show_plan(plan(settings, found, devices.select(device), gpus or 1), console)
        return
    images = training.open_images(settings, preset, console)
    if gpus is not None and not ranks.is_launched():
        ranks.launch(sys.argv[1:], gpus, device)
        return
    with ranks.joined_ranks(device) as (mine, where):
        place = training.run_folder(run, preset, "vq")
        with training.locked(place, mine):
            planned = plan(settings, images, where, mine.world_size)
            training.announce(planned, console)
            train = settings.train_vq
            judge = training.judge(train, settings, "val", train.evaluate_images, place, weights, where, mine, console)
            stage = TokenizerTraining(settings, images, where, weights, mine, judge)
            manifest = mine.from_first(
                lambda: runs.begin(
                    place, preset=preset, settings=settings, steps=stage.steps, data=images.manifest.hash
                )
            )
            console.log(f"train-vq {preset} on {where}, to {place.folder}")
            _warn_of_late_discriminator(stage, console)
            training.train(stage, place, manifest, console, planned)


def plan(settings: Preset, images: PreparedSet | None, device: torch.device, processes: int) -> dict[str, Any]:
    """What training these settings would do.

    Args:
        settings: The preset.
        images: The prepared set; None = it is not there, and what depends on it is null.
        device: Where.
        processes: That share each batch.

    Returns:
        Parameters by part, the judges', the length of the run, and the memory (GiB) and arithmetic (TFLOP) of a step.
    """
    train = settings.train_vq
    with torch.device("meta"):
        model = Tokenizer(settings.vq)
        discriminator = PatchDiscriminator(train.discriminator_channels, train.discriminator_layers)
    count = None if images is None else images.manifest.counts["train"]
    length = training.length(train, count, processes)
    known = length["steps"] is not None and length["steps_per_epoch"] is not None
    return {
        "parameters": training.parameters(model),
        "discriminator": training.parameters(discriminator)["total"] if train.adversarial_weight > 0 else 0,
        "lpips": cost.lpips_parameters() if train.perceptual_weight > 0 else 0,
        "images": count,
        **length,
        "discriminator_start": train.discriminator_step(length["steps"], length["steps_per_epoch"]) if known else None,
        **training.costs(cost.of_tokenizer(settings.vq, train, device, processes)),
    }


def _warn_of_late_discriminator(stage: TokenizerTraining, console: Console) -> None:
    if stage.discriminator is not None and stage.discriminator_start >= stage.steps:
        console.warn(
            f"the discriminator starts at step {stage.discriminator_start:,}, but the run ends at {stage.steps:,}: "
            "it will never train. Set train_vq.discriminator_start, to 50% say."
        )
