"""The shared course of `train-vq` and `train-prior`: check the request, show the plan, train, and report the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from movq_cli import agreement, devices, files, presets, runs
from movq_cli.commands.outlook import Outlook, require_one_length
from movq_cli.commands.training_plan import Plan, announce, flatten, show_plan, warn_of_late_discriminator
from movq_cli.console import Console
from movq_cli.data.shards import MANIFEST, PreparedSet, SplitName
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import pretrained
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.launcher import joined_ranks, launch, starts_processes
from movq_cli.paths import require_utf8
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.run_manifest import COMMAND, Kind, RunManifest
from movq_cli.runs import ROOT, Run
from movq_cli.settings import Preset
from movq_cli.training import checkpointer, loop
from movq_cli.training.initial_weights import InitialWeights
from movq_cli.training.log import Metrics
from movq_cli.training.stage import Stage
from movq_cli.training_settings import TrainSettings
from movq_cli.version import __version__

_OF_EACH_MACHINE = {"data.path", "data.workers", "description"}
"""Settings that may differ between the ranks of a run, because they do not change what is trained."""

_CROP_RATIO_LIMIT = 1.25
"""Images whose side is more than this times the crop's lead to a warning; the field's usual crops are below it."""


@dataclass(frozen=True)
class TrainRequest:
    """The options of a training command."""

    preset_name: str
    """Name of a preset, or path of a preset file."""
    overrides: Sequence[str] = ()
    """Settings to change, as `section.name=value`."""
    run: Path | None = None
    """Run folder; None uses a folder below `runs/` that is named after the preset."""
    origin: str | None = None
    """Run whose state is the start, as RUN or RUN@STEP; None starts with new weights."""
    initial: InitialWeights | None = None
    """Weights with which the training of a tokenizer begins; None begins with random ones."""
    tokenizer: Path | None = None
    """Run folder or weight file of the tokenizer, for a prior; None uses the newest finished run that fits."""
    codes: Path | None = None
    """Folder of the cached codes, for a prior; None uses one beside the tokenizer, or in the new run."""
    device_name: str | None = None
    """Name of the device; None uses CUDA if it is available."""
    gpus: int | None = None
    """Number of processes to start, one for each GPU; None uses this process, or those that torchrun started."""
    arguments: Sequence[str] = ()
    """Command-line arguments, with which `gpus` starts the processes."""
    weights: Path | None = None
    """Folder with the pretrained weights of metrics and losses; None uses torch hub's."""
    hours: float | None = None
    """Time for the complete training, from which its number of steps is computed; None leaves it to the settings."""
    dry_run: bool = False
    """Print the plan without training; this needs no data."""


@dataclass(frozen=True)
class TrainContext:
    """Everything from which a stage is built, on one rank."""

    request: TrainRequest
    settings: Preset
    hours: float | None
    """Time that `--hours` gives to the run; None if the settings give its length."""
    images: PreparedSet
    run: Run
    device: torch.device
    ranks: Ranks
    plan: Plan
    console: Console


SetUp = Callable[[TrainContext], tuple[Stage, RunManifest]]
"""Builds the stage on this rank, and starts or resumes its run."""


class Planner(Protocol):
    """Computes the plan of a stage's training."""

    def __call__(self, settings: Preset, images: PreparedSet | None, device: torch.device, processes: int) -> Plan:
        """Return the plan; what depends on the images is null if they are not available."""


class Preparation(Protocol):
    """Checks a request against its images, before anything takes long."""

    def __call__(self, settings: Preset, images: PreparedSet, ranks: Ranks) -> SetUp:
        """Return the function that builds the stage; every rank must call this."""


def run_training(
    request: TrainRequest,
    console: Console,
    *,
    kind: Kind,
    plan: Planner,
    prepare: Preparation,
    folder_suffix: Callable[[Preset], str] | None = None,
) -> None:
    """Carry out a training command: a dry run, a start on several processes, or the training on this rank.

    Args:
        request: Options of the command.
        console: Console for the plan, the progress and the result.
        kind: Stage to train.
        plan: Function that computes the plan.
        prepare: Function that checks the request against the images, and returns the function that builds the stage.
        folder_suffix: Function that returns the end of the default run folder's name; None uses the kind.

    Raises:
        BadRequestError: The request cannot be carried out.
        FailureError: Training failed.
        InterruptedRunError: The process received one of `signals.STOP_SIGNALS`.
    """
    require_one_length(kind, request.overrides, request.hours)
    for path in (request.preset_name, request.origin):
        require_utf8(Path(path or "."))
    if request.dry_run:
        _dry_run(request, console, kind, plan, folder_suffix)
        return
    if starts_processes(request.gpus):
        assert request.gpus is not None
        _open(
            request, SINGLE_PROCESS, prepare, folder_suffix, console
        )  # A bad request is refused before any process is started.
        launch(request.arguments, request.gpus, request.device_name)
        return
    # What each rank reads itself is read after the ranks have joined, so that the error of one rank ends all of them.
    with joined_ranks(request.device_name) as (ranks, device):
        settings, images, set_up, suffix = _open(request, ranks, prepare, folder_suffix, console)
        run = run_folder(request.run, request.preset_name, kind, suffix)
        with locked(run, ranks):
            outlook = Outlook(
                kind, images, device, request.weights, ranks.world_size, ranks, _steps_before(request, kind)
            )
            settings, hours = outlook.length(settings, request.preset_name, request.overrides, request.hours, run)
            planned = plan(settings, images, device, ranks.world_size)
            outlook.require_memory(settings, planned)
            planned |= outlook.entries(settings, planned, console)
            announce(planned, console)
            warn_of_late_discriminator(planned, console)
            context = TrainContext(request, settings, hours, images, run, device, ranks, planned, console)
            stage, manifest = set_up(context)
            train(context, stage, manifest)


def _dry_run(
    request: TrainRequest,
    console: Console,
    kind: Kind,
    plan: Planner,
    folder_suffix: Callable[[Preset], str] | None,
) -> None:
    """Print the plan of a training, which needs no images; warn if the training would be refused here."""
    settings = presets.load(request.preset_name, request.overrides)
    suffix = None if folder_suffix is None else folder_suffix(settings)
    device, images, ranks = devices.select(request.device_name), find_images(settings), request.gpus or 1
    outlook = Outlook(kind, images, device, request.weights, ranks, done=_steps_before(request, kind))
    run = run_folder(request.run, request.preset_name, kind, suffix)
    settings, _ = outlook.length(settings, request.preset_name, request.overrides, request.hours, run)
    planned = plan(settings, images, device, ranks)
    planned |= outlook.entries(settings, planned, console)
    show_plan(planned, console)
    warn_of_late_discriminator(planned, console)
    try:
        outlook.require_memory(settings, planned)
    except BadRequestError as error:
        console.warn(f"on this machine, {error}")


def _steps_before(request: TrainRequest, kind: Kind) -> int:
    """Return the number of steps that the run with which a request starts has done."""
    if request.origin is None:
        return 0
    origin, step = origin_of(request.origin, kind)
    return origin.read().step if step is None else step


def _open(
    request: TrainRequest,
    ranks: Ranks,
    prepare: Preparation,
    folder_suffix: Callable[[Preset], str] | None,
    console: Console,
) -> tuple[Preset, PreparedSet, SetUp, str | None]:
    """Return the settings, the images, the function that builds the stage, and the suffix, equal on all ranks.

    Raises:
        BadRequestError: The request cannot be carried out, or the settings or the images of a rank differ.
    """
    agreement.require_same(ranks, {"the version of movq": __version__, "the version of PyTorch": torch.__version__})
    settings = presets.load(request.preset_name, request.overrides)
    require_utf8(settings.data.path)
    flat = dict(flatten(settings.model_dump()))
    agreement.require_same(ranks, {name: value for name, value in flat.items() if name not in _OF_EACH_MACHINE})
    suffix = None if folder_suffix is None else folder_suffix(settings)  # It refuses an unknown kind of prior.
    images = open_images(settings, request.preset_name, console)
    manifest = images.manifest
    agreement.require_same_content(ranks, "the prepared set", images.root, manifest.hash)
    agreement.require_same(ranks, {"the classes of the prepared set": manifest.classes})
    return settings, images, prepare(settings, images, ranks), suffix


def run_folder(named: Path | None, preset_name: str, kind: Kind, suffix: str | None = None) -> Run:
    """Return the run folder: the named one, or the preset's own below `runs/`, which ends in the suffix or the kind."""
    run = Run(named or ROOT / f"{Path(preset_name).stem}-{suffix or kind}", kind)
    require_utf8(run.folder)
    return run


def open_images(settings: Preset, preset_name: str, console: Console) -> PreparedSet:
    """Open the prepared set that the settings name; warn if training would see only a small crop of its images.

    Raises:
        BadRequestError: The set does not exist, or it has no validation images. The hint says what to prepare.
    """
    path = settings.data.path
    images = find_images(settings)
    if images is None:
        raise BadRequestError(
            f"preset {preset_name!r} trains on the prepared set {path}, which does not exist",
            f"Prepare it (movq prepare IMAGES {path} --size {settings.vq.image_size}) or name another with --data.",
        )
    if not images.manifest.counts["val"]:
        raise BadRequestError(
            f"the prepared set {path} has no validation images", "Prepare it from at least two images."
        )
    size = settings.vq.image_size
    smallest = images.smallest_size(size)
    if all(stored > _CROP_RATIO_LIMIT * side for stored, side in zip(smallest, size, strict=True)):
        at_least = f"{smallest.height} pixels a side"
        if not smallest.is_square:
            at_least = f"{smallest.height} pixels of height and {smallest.width} of width"
        console.warn(
            f"the images of {path} have at least {at_least}, but training sees crops of {size.in_words}. "
            f"To train on complete images, prepare them with --size {size}."
        )
    return images


def find_images(settings: Preset) -> PreparedSet | None:
    """Return the prepared set that the settings name; None if it does not exist yet."""
    return PreparedSet.open(settings.data.path) if (settings.data.path / MANIFEST).is_file() else None


@contextmanager
def locked(run: Run, ranks: Ranks) -> Iterator[None]:
    """Lock a run folder, because two commands that train in it would overwrite each other's files.

    Raises:
        BadRequestError: Another command is training in it.
    """
    if not ranks.is_first:
        yield
        return
    with files.locked(run.folder, f"movq {COMMAND[run.kind]}"):
        yield


def start_run(context: TrainContext, steps: int, tokenizer: str | None = None) -> RunManifest:
    """Start the run, branch it from another run, or resume it; rank 0 alone calls this.

    Args:
        context: Request, settings, images and run.
        steps: Number of steps of the complete run.
        tokenizer: SHA-256 of the tokenizer's weight file, for a prior.

    Raises:
        BadRequestError: The folder has another run, or the origin has no such state.
    """
    run, request = context.run, context.request
    manifest = runs.new_manifest(
        run.kind,
        preset_name=request.preset_name,
        settings=context.settings,
        steps=steps,
        data=context.images.manifest.hash,
        tokenizer=tokenizer,
        hours=context.hours,
    )
    if request.origin is None:
        initial = request.initial
        return runs.start_or_resume(run, manifest, None if initial is None else (str(initial.path), initial.digests))
    origin, step = origin_of(request.origin, run.kind)
    if origin.folder.resolve() == run.folder.resolve():
        raise BadRequestError(
            f"{origin.folder} is both the run to start from and the new run", "Name a new folder with --run."
        )
    if not run.manifest_file.exists():
        return checkpointer.branch(origin, step, run, manifest)
    # The branch was started before, and is now resumed, or started again if its checkpoint is missing.
    if str(origin.folder) not in {change.branched_from for change in run.read().history}:
        raise BadRequestError(
            f"{run.folder} already has a run, which did not start from {origin.folder}",
            "Name a new folder with --run.",
        )
    resumed = runs.resumed(run, manifest)
    last = resumed.origin
    if last is not None and last.branched_from == str(origin.folder) and runs.lacks_checkpoint(run, resumed):
        return checkpointer.branch(origin, last.step if step is None else step, run, manifest)
    return runs.start_or_resume(run, manifest)


def origin_of(text: str, kind: Kind) -> tuple[Run, int | None]:
    """Return the run and the step that `--from RUN[@STEP]` names; the step is None if it is not given.

    Raises:
        BadRequestError: There is no such run.
    """
    folder, separator, step = text.rpartition("@")
    if not separator or not step.isdecimal() or Path(text).exists():
        folder, step = text, ""
    run = Run(Path(folder), kind)
    if not run.folder.is_dir():
        raise BadRequestError(f"there is no run folder {folder}", "Give --from as RUN or RUN@STEP.")
    run.read()
    return run, int(step) if step else None


def train(context: TrainContext, stage: Stage, manifest: RunManifest) -> None:
    """Train a stage to its end unless its run is finished, and print the run folder as the result."""
    run, console = context.run, context.console
    metrics: Metrics = {}
    # A run that has lost its weights gets them back from its checkpoint.
    if manifest.status == "finished" and stage.ranks.from_first(run.weights.is_file):
        why = " and stopped early, by early_stop" if manifest.stopped_early else ""
        console.log(f"{run.folder} is finished already (step {manifest.step}{why}); nothing to do")
    else:
        metrics = loop.train(
            stage,
            run,
            manifest,
            console,
            tflop_per_step=context.plan["tflop_per_step"],
            session=_session(context),
        )
    step = stage.ranks.from_first(lambda: run.read().step)
    console.result({"run": str(run.folder), "step": step, **metrics}, str(run.folder))


def _session(context: TrainContext) -> dict[str, Any]:
    """Return the description of this process for the log."""
    plan = context.plan
    return {
        "command": ["movq", *context.request.arguments],
        "device": devices.describe(context.device),
        "ranks": context.ranks.world_size,
        "torch": torch.__version__,
        "version": __version__,
        "parameters": plan["parameters"],
        "images": dict(context.images.manifest.counts),
        "steps_per_epoch": plan["steps_per_epoch"],
        "discriminator_start": plan.get("discriminator_start") if plan.get("discriminator") else None,
    }


def fid_evaluator(context: TrainContext, train: TrainSettings, split: SplitName, limit: int) -> FIDEvaluator | None:
    """Return what measures FID during training, after computing or reading the features of the real images.

    Args:
        context: Images, run, device and ranks of the training.
        train: Training settings. None is returned if `evaluate_every` is 0, or if it is null and a rank does not have
            Inception's weights.
        split: Split of the real images.
        limit: Largest number of real images; they are evenly spaced over the split.

    Raises:
        BadRequestError: Inception's weights are missing, or there are several machines that do not share the run
            folder, in which the features are then stored.
    """
    if train.evaluate_every == 0:
        return None
    if train.evaluate_every is None:
        is_missing = not pretrained.is_available("inception", context.request.weights)
        if context.ranks.any(is_missing):
            return None
    settings, console = context.settings, context.console
    # The runs of one machine share the features; several machines share nothing but the run folder.
    features = files.cache_folder() if context.ranks.is_one_machine else context.run.folder / "features"
    agreement.require_shared(context.ranks, features)
    real = ImageSet("real", str(settings.data.path), split, crop=settings.vq.image_size, limit=limit, console=console)
    return FIDEvaluator.of(real, features, context.request.weights, context.device, context.ranks, console)
