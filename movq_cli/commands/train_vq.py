"""`movq train-vq`: train a tokenizer on a prepared set."""

from __future__ import annotations

import torch

from movq_cli import agreement
from movq_cli.commands import training, training_plan
from movq_cli.commands.training import TrainContext, TrainRequest
from movq_cli.commands.training_plan import Plan
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.run_manifest import RunManifest
from movq_cli.settings import Preset
from movq_cli.training import cost
from movq_cli.training.initial_weights import InitialWeights
from movq_cli.training.vq import TokenizerTraining
from movq_cli.training_settings import TrainVQSettings


def train_vq(request: TrainRequest, console: Console) -> None:
    """Train stage 1, or resume its training.

    Args:
        request: Options of the command.
        console: Console for the plan, the progress and the result.
    """
    training.run_training(request, console, kind="vq", plan=plan, prepare=lambda *_, **__: _set_up)


def plan(settings: Preset, images: PreparedSet | None, device: torch.device, processes: int) -> Plan:
    """Return the plan of training stage 1.

    Args:
        settings: Settings of the preset.
        images: Prepared set; None if it does not exist, and what depends on it is then null.
        device: Device on which the training will run.
        processes: Number of processes that share each batch.

    Returns:
        The parameters of the tokenizer by part, of the discriminator and of LPIPS; the length of the run; the memory
        (GiB) and arithmetic (1e12 operations) of a step.
    """
    train = settings.train_vq
    with torch.device("meta"):
        model = Tokenizer(settings.vq)
        discriminator = PatchDiscriminator(**train.discriminator_layout)
    count = None if images is None else images.manifest.counts["train"]
    length = training_plan.length(train, count, processes)
    steps, steps_per_epoch = length["steps"], length["steps_per_epoch"]
    is_in_epochs = str(train.discriminator_start).endswith(("epoch", "epochs"))
    is_known = steps is not None and (steps_per_epoch is not None or not is_in_epochs)
    return {
        "parameters": training_plan.parameters(model),
        "discriminator": training_plan.parameters(discriminator)["total"] if train.adversarial_weight > 0 else 0,
        "lpips": cost.lpips_parameters() if train.perceptual_weight > 0 else 0,
        "images": count,
        **length,
        "discriminator_start": (train.discriminator_step(steps, steps_per_epoch or 0) if is_known else None),
        **training_plan.costs(cost.of_tokenizer(settings.vq, train, device, processes)),
    }


def _set_up(context: TrainContext) -> tuple[TokenizerTraining, RunManifest]:
    """Build the training of the tokenizer, and start or resume its run."""
    request, settings, console = context.request, context.settings, context.console
    train = settings.train_vq
    evaluator = training.fid_evaluator(context, train, "val", train.evaluate_images)
    stage = TokenizerTraining(settings, context.images, context.device, request.weights, context.ranks, evaluator)
    _require_same_metrics(stage)
    if request.initial is not None:
        agreement.require_same_content(
            context.ranks, "the initial weights", request.initial.path, request.initial.digests[0]
        )
        stage.start_from(request.initial)
    manifest = context.ranks.from_first(lambda: training.start_run(context, stage.steps))
    stage.same_codes = _same_codes(settings.train_vq, manifest)
    console.log(f"train-vq {request.preset_name} on {context.device}, to {context.run.folder}")
    if request.initial is not None:
        console.log(f"initial weights: {request.initial.path}, {_describe_discriminator(stage, request.initial)}")
    return stage, manifest


def _same_codes(train: TrainVQSettings, manifest: RunManifest) -> tuple[str, ...]:
    """Return the SHA-256 of the initial weights if the run does not change their codes, and none otherwise."""
    is_fixed = {"encoder", "codebook"} <= set(train.freeze)
    was_fixed = not any("train_vq.freeze" in change.settings for change in manifest.history)
    weights = (digest for change in manifest.history for digest in change.weights)
    return tuple(weights) if is_fixed and was_fixed else ()


def _describe_discriminator(stage: TokenizerTraining, initial: InitialWeights) -> str:
    if stage.adversary is None:
        return "without a discriminator"
    if initial.discriminator_of(stage.settings) is not None:
        return "with their discriminator"
    reason = "" if initial.discriminator is None else ", which has another layout"
    return (
        f"without their discriminator{reason}: a new one is trained from step "
        f"{stage.adversary.first_step} on, and its loss begins at step {stage.adversary.start}"
    )


def _require_same_metrics(stage: TokenizerTraining) -> None:
    """Check that all ranks have the same metrics and the same perceptual loss, whose weights each rank reads itself."""
    perceptual = {} if stage.perceptual is None else {"lpips": stage.perceptual.state_dict()}
    agreement.require_same(
        stage.ranks,
        {
            "the list of validation metrics": [metric.key for metric in stage.metrics],
            "the metric of the best weights": stage.criterion.metric,
            "the hash of the weights of LPIPS": agreement.fingerprints(perceptual),
        },
        "Give every machine the same pretrained weights (movq weights --fetch), and name their folder with --weights.",
    )
