"""`movq train-prior`: train a prior on a tokenizer's codes of a prepared set."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch

from movq_cli import agreement, checkpoints, runs, signals
from movq_cli.commands import training, training_plan
from movq_cli.commands.training import SetUp, TrainContext, TrainRequest
from movq_cli.commands.training_plan import Plan
from movq_cli.console import Console
from movq_cli.data import code_cache, loader
from movq_cli.data.shards import PreparedSet, SplitName
from movq_cli.devices import WithoutInitialization
from movq_cli.errors import BadRequestError
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.files import link_or_copy, sha256
from movq_cli.interop import hub
from movq_cli.models import priors
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import Ranks
from movq_cli.run_manifest import RunManifest
from movq_cli.runs import Run
from movq_cli.settings import Preset, ViewSettings
from movq_cli.training import cost
from movq_cli.training.prior import PriorTraining

_REFERENCES = 50_000
"""Largest number of training images with which samples are compared during training, as in the field's references."""


def train_prior(request: TrainRequest, console: Console) -> None:
    """Train stage 2, or resume its training.

    Args:
        request: Options of the command.
        console: Console for the plan, the progress and the result.
    """

    def prepare(settings: Preset, images: PreparedSet, ranks: Ranks) -> SetUp:
        _check_classes(settings, images)
        weights = ranks.from_first(lambda: runs.find_weights(request.tokenizer, "vq", fits=settings.vq))
        return partial(_set_up, weights)

    training.run_training(
        request,
        console,
        kind="prior",
        plan=plan,
        prepare=prepare,
        folder_suffix=partial(_folder_suffix, request),
    )


def _folder_suffix(request: TrainRequest, settings: Preset) -> str:
    """Return the end of the name of the run folder, after a check that the prior has the settings of the request."""
    kind = priors.prior_class(settings.prior)
    kind.check_training_settings(settings.train_prior)
    given = {override.partition("=")[0] for override in request.overrides}
    for name in sorted(kind.unused_training_settings):
        if f"train_prior.{name}" in given:
            raise BadRequestError(
                f"-o train_prior.{name} has no meaning for this prior (mode {settings.prior.mode}), which "
                f"{kind.decoding}",
                f"Leave -o train_prior.{name} out.",
            )
    return kind.run_suffix


def plan(settings: Preset, images: PreparedSet | None, device: torch.device, processes: int) -> Plan:
    """Return the plan of training stage 2.

    Args:
        settings: Settings of the preset.
        images: Prepared set; None if it does not exist, and what depends on it is then null.
        device: Device on which the training will run.
        processes: Number of processes that share each batch.

    Returns:
        The parameters of the prior by part; the length of the run, whose epochs are counted in image views; the memory
        (GiB) and arithmetic (1e12 operations) of a step.
    """
    train, shape = settings.train_prior, settings.vq.code_shape
    count = None if images is None else images.manifest.counts["train"]
    views = None if count is None else count * settings.views.count
    with torch.device("meta"), WithoutInitialization():
        model = priors.build(settings.prior, shape)
    return {
        "parameters": training_plan.parameters(model),
        "images": count,
        "views": views,
        **training_plan.length(train, views, processes),
        **training_plan.costs(cost.of_prior(settings.prior, shape, train, device, processes)),
    }


def _set_up(weights: Path, context: TrainContext) -> tuple[PriorTraining, RunManifest]:
    """Start or resume the run, and build the training of the prior on the tokenizer's codes."""
    settings, console = context.settings, context.console
    console.log(f"tokenizer: {weights}")
    caches = context.ranks.from_first(lambda: _code_caches(context, weights))
    agreement.require_shared(context.ranks, caches)  # All ranks read the codes that each rank encodes.
    model = checkpoints.load_tokenizer(weights).to(context.device)
    _check_tokenizer(settings, model, weights)
    loader.check_size(context.images, settings.vq)
    # The run is started before the encoding, which may take hours, so that a folder of another run is refused at once.
    digest = sha256(weights)
    agreement.require_same_content(context.ranks, "the tokenizer", weights, digest)
    manifest = context.ranks.from_first(lambda: _start_or_resume(context, weights, digest))
    evaluator = training.fid_evaluator(context, settings.train_prior, "train", _REFERENCES)
    with signals.interruptible("the codes encoded", launched=context.ranks.world_size > 1):
        stage = _stage(context, model, caches, digest, evaluator)
    console.log(
        f"train-prior {context.request.preset_name} on {context.device}, to {context.run.folder}; "
        f"an epoch is {context.plan['views']:,} image views"
    )
    return stage, manifest


def _code_caches(context: TrainContext, weights: Path) -> Path:
    """Return the folder of the code caches: a read-only folder, or the cache of the hub, cannot have them."""
    if context.request.codes is not None:
        return context.request.codes
    is_downloaded = hub.address_of(context.request.tokenizer) is not None
    folder = weights.parent if os.access(weights.parent, os.W_OK) and not is_downloaded else context.run.folder
    return Run(folder, "vq").code_caches


def _stage(
    context: TrainContext, model: Tokenizer, caches: Path, digest: str, evaluator: FIDEvaluator | None
) -> PriorTraining:
    """Encode the images that are not encoded yet, and build the training of the prior."""
    settings, images, device = context.settings, context.images, context.device

    def codes(split: SplitName) -> code_cache.CodeCache:
        return code_cache.load_or_encode(
            caches,
            model,
            images.split(split),
            loading=settings.data,
            views=settings.views if split == "train" else ViewSettings(),
            name=split,
            data=images.manifest.hash,
            tokenizer=digest,
            batch_size=64,
            device=device,
            ranks=context.ranks,
            console=context.console,
        )

    return PriorTraining(settings, codes("train"), codes("val"), model, digest, device, context.ranks, evaluator)


def _start_or_resume(context: TrainContext, weights: Path, digest: str) -> RunManifest:
    """Start or resume the run, and store the tokenizer in its folder."""
    manifest = training.start_run(context, context.plan["steps"], digest)
    # So sampling needs this folder alone, even after a move.
    link_or_copy(weights, context.run.tokenizer)
    return manifest


def _check_classes(settings: Preset, images: PreparedSet) -> None:
    required, available = settings.prior.classes, len(images.manifest.classes)
    if required not in {0, available}:
        raise BadRequestError(
            f"the preset is for {required} classes, but the prepared set {settings.data.path} has {available}",
            f"Set -o prior.classes={available}.",
        )


def _check_tokenizer(settings: Preset, model: Tokenizer, weights: Path) -> None:
    for name, value in settings.vq:
        actual = getattr(model.settings, name)
        if actual != value:
            raise BadRequestError(
                f"the tokenizer in {weights} has vq.{name} = {actual}, not the preset's {value}",
                "Name a tokenizer of this preset with --tokenizer, or set the values with which it was trained.",
            )
