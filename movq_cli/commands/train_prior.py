"""`movq train-prior`: train a prior on a tokenizer's codes of a prepared set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from movq_cli import checkpoints, devices, presets, runs
from movq_cli.commands import training
from movq_cli.console import Console
from movq_cli.data import loader, tokens
from movq_cli.data.shards import PreparedSet, SplitName
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_path, sha256
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.models.transformer import CodeTransformer
from movq_cli.settings import Preset
from movq_cli.training.prior import PriorTraining


def train_prior(
    *,
    preset: str,
    overrides: Sequence[str],
    tokenizer: Path | None,
    run: Path | None,
    device: str | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Train stage 2.

    Args:
        preset: Name or path.
        overrides: Dotted settings.
        tokenizer: Run folder of `train-vq`; None = the newest finished one of the preset's tokenizer.
        run: Run folder; None = `runs/PRESET-prior`.
        device: Name; None = CUDA where there is one.
        dry_run: Only print the plan; needs no data.
        console: Where to speak.
    """
    settings = presets.load(preset, overrides)
    if dry_run:
        training.show_plan(plan(settings), console)
        return
    images = training.open_images(settings, preset, console)
    _check_classes(settings, images)
    codes_from = runs.resolve(tokenizer, "vq", fits=settings.vq)
    console.log(f"tokenizer: {codes_from.folder}")
    where = devices.pick(device)
    model = checkpoints.load_tokenizer(codes_from.weights).to(where)
    _check_tokenizer(settings, model, codes_from)
    loader.check_side(images.manifest.min_side, settings.vq.resolution, settings.data.path)
    digest = sha256(codes_from.weights)
    caches = {
        split: _codes(codes_from, model, images, split, digest, where, console) for split in images.manifest.counts
    }
    stage = PriorTraining(settings, caches["train"], caches["val"], model, digest, where)
    place = training.run_folder(run, preset, "prior")
    manifest = runs.begin(
        place,
        preset=preset,
        settings=settings,
        steps=stage.steps,
        data=images.manifest.hash,
        tokenizer=digest,
    )
    _keep_tokenizer(codes_from.weights, place.tokenizer)
    console.log(
        f"train-prior {preset}: {training.parameters(stage.model)['total']:,} parameters on {where}, "
        f"{len(caches['train']):,} image views, {stage.steps:,} steps of {settings.train_prior.batch_size}, "
        f"to {place.folder}"
    )
    training.train(stage, place, manifest, console)


def plan(settings: Preset) -> dict[str, Any]:
    """What training these settings would do: parameters by part, steps (null where they depend on the data)."""
    with torch.device("meta"):
        model = CodeTransformer(settings.prior, settings.vq.code_shape)
    return {
        "parameters": training.parameters(model),
        "steps": settings.train_prior.steps,
        "epochs": settings.train_prior.epochs,
        "batch_size": settings.train_prior.batch_size,
        "learning_rate": settings.train_prior.learning_rate,
    }


def _check_classes(settings: Preset, images: PreparedSet) -> None:
    wanted, found = settings.prior.classes, len(images.manifest.classes)
    if wanted not in {0, found}:
        raise BadRequestError(
            f"the preset is for {wanted} classes, but the prepared set {settings.data.path} has {found}",
            f"Set -o prior.classes={found}.",
        )


def _check_tokenizer(settings: Preset, model: Tokenizer, codes_from: runs.Run) -> None:
    for name, value in settings.vq:
        found = getattr(model.settings, name)
        if found != value:
            raise BadRequestError(
                f"the tokenizer in {codes_from.folder} has vq.{name} = {found}, not the preset's {value}",
                "Name a tokenizer of this preset with --tokenizer, or the settings that it was trained with.",
            )


def _codes(
    codes_from: runs.Run,
    model: Tokenizer,
    images: PreparedSet,
    split: SplitName,
    digest: str,
    device: torch.device,
    console: Console,
) -> tokens.TokenCache:
    return tokens.cached(
        codes_from.tokens,
        model,
        images.split(split),
        name=split,
        data=images.manifest.hash,
        tokenizer=digest,
        batch_size=64,
        device=device,
        console=console,
    )


def _keep_tokenizer(weights: Path, beside: Path) -> None:
    """Put the tokenizer beside the prior, so that the run folder samples wherever it is moved."""
    with atomic_path(beside) as partial:
        try:
            os.link(weights, partial)
        except OSError:  # another file system, or one without links
            shutil.copyfile(weights, partial)
