"""`movq train-prior`: train a prior on a tokenizer's codes of a prepared set."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from movq_cli import checkpoints, devices, presets, ranks, runs, signals
from movq_cli.commands import training
from movq_cli.console import Console
from movq_cli.data import code_cache, loader
from movq_cli.data.shards import PreparedSet, SplitName
from movq_cli.errors import BadRequestError
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.files import atomic_path, sha256
from movq_cli.models import priors
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import Ranks
from movq_cli.settings import Preset, ViewSettings
from movq_cli.training import cost
from movq_cli.training.prior import PriorTraining

_REFERENCES = 50_000
"""Training images, at most, that samples are held against at intervals: as many as the field's references have."""


def train_prior(
    *,
    preset: str,
    overrides: Sequence[str],
    tokenizer: Path | None,
    run: Path | None,
    device: str | None,
    gpus: int | None,
    weights: Path | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Train stage 2.

    Args:
        preset: Name or path.
        overrides: Dotted settings.
        tokenizer: Run folder of `train-vq`; None = the newest finished one of the preset's tokenizer.
        run: Run folder; None = `runs/PRESET-prior`, or -auto or -depth by the mode.
        device: Name; None = CUDA where there is one.
        gpus: Processes to start, one a GPU; None = this one alone, or those that torchrun has started.
        weights: Folder with Inception's weights, for FID; None = torch hub's.
        dry_run: Only print the plan; needs no data.
        console: Where to speak.
    """
    settings = presets.load(preset, overrides)
    suffix = priors.prior_class(settings.prior).run_suffix
    if dry_run:
        found = training.find_images(settings)
        training.show_plan(plan(settings, found, devices.select(device), gpus or 1), console)
        return
    images = training.open_images(settings, preset, console)
    _check_classes(settings, images)
    codes_from = runs.resolve(tokenizer, "vq", fits=settings.vq)
    if gpus is not None and not ranks.is_launched():
        ranks.launch(sys.argv[1:], gpus, device)
        return
    with ranks.joined_ranks(device) as (mine, where):
        place = training.run_folder(run, preset, "prior", suffix)
        with training.locked(place, mine):
            console.log(f"tokenizer: {codes_from.folder}")
            planned = plan(settings, images, where, mine.world_size)
            training.announce(planned, console)
            # Before the encoding, which may take hours: a folder of another run is refused at once.
            digest = sha256(codes_from.weights)
            manifest = mine.from_first(
                lambda: _begin(settings, planned["steps"], place, preset, images, codes_from, digest)
            )
            train = settings.train_prior
            judge = training.judge(train, settings, "train", _REFERENCES, place, weights, where, mine, console)
            with signals.interruptible("the codes encoded", launched=mine.world_size > 1):
                stage = _stage(settings, images, codes_from, digest, mine, where, judge, console)
            console.log(
                f"train-prior {preset} on {where}, to {place.folder}; an epoch is {planned['views']:,} image views"
            )
            training.train(stage, place, manifest, console, planned)


def plan(settings: Preset, images: PreparedSet | None, device: torch.device, processes: int) -> dict[str, Any]:
    """What training these settings would do.

    Args:
        settings: The preset.
        images: The prepared set; None = it is not there, and what depends on it is null.
        device: Where.
        processes: That share each batch.

    Returns:
        Parameters by part, the length of the run, whose epochs are of image views, and the memory (GiB) and arithmetic
        (TFLOP) of a step.
    """
    train, shape = settings.train_prior, settings.vq.code_shape
    count = None if images is None else images.manifest.counts["train"]
    views = None if count is None else count * settings.views.count
    with torch.device("meta"):
        model = priors.build(settings.prior, shape)
    return {
        "parameters": training.parameters(model),
        "images": count,
        "views": views,
        **training.length(train, views, processes),
        **training.costs(cost.of_prior(settings.prior, shape, train, device, processes)),
    }


def _stage(
    settings: Preset,
    images: PreparedSet,
    codes_from: runs.Run,
    digest: str,
    mine: Ranks,
    device: torch.device,
    judge: FIDEvaluator | None,
    console: Console,
) -> PriorTraining:
    """Encode what is not encoded yet, and put the training together."""
    model = checkpoints.load_tokenizer(codes_from.weights).to(device)
    _check_tokenizer(settings, model, codes_from)
    loader.check_side(images.manifest.min_side, settings.vq.resolution, settings.data.path)

    def codes(split: SplitName) -> code_cache.CodeCache:
        return code_cache.load_or_encode(
            codes_from.code_caches,
            model,
            images.split(split),
            loading=settings.data,
            views=settings.views if split == "train" else ViewSettings(),
            name=split,
            data=images.manifest.hash,
            tokenizer=digest,
            batch_size=64,
            device=device,
            ranks=mine,
            console=console,
        )

    return PriorTraining(settings, codes("train"), codes("val"), model, digest, device, mine, judge)


def _begin(
    settings: Preset,
    steps: int,
    place: runs.Run,
    preset: str,
    images: PreparedSet,
    codes_from: runs.Run,
    digest: str,
) -> runs.RunManifest:
    manifest = runs.begin(
        place,
        preset=preset,
        settings=settings,
        steps=steps,
        data=images.manifest.hash,
        tokenizer=digest,
    )
    _keep_tokenizer(codes_from.weights, place.tokenizer)
    return manifest


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


def _keep_tokenizer(weights: Path, beside: Path) -> None:
    """Put the tokenizer beside the prior, so that the run folder samples wherever it is moved."""
    with atomic_path(beside) as partial:
        try:
            os.link(weights, partial)
        except OSError:  # another file system, or one without links
            shutil.copyfile(weights, partial)
