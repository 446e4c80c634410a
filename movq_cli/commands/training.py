"""What `train-vq` and `train-prior` do alike: say what they are about to do, train, and give the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from movq_cli import files
from movq_cli.console import Console
from movq_cli.data.shards import MANIFEST, PreparedSet, SplitName
from movq_cli.errors import BadRequestError
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.ranks import Ranks
from movq_cli.runs import COMMAND, ROOT, Kind, Run, RunManifest
from movq_cli.settings import Preset, TrainSettings
from movq_cli.training import loop
from movq_cli.training.cost import Cost
from movq_cli.training.log import Metrics

_SPOKEN = {"quantize": "quantizer"}
"""Parts that are called otherwise than the parameters in published weights are."""

_ROOMY = 1.25
"""Images larger than this times the crop are rather seen in parts than whole; the field's own crops are within it."""


def run_folder(named: Path | None, preset: str, kind: Kind, suffix: str | None = None) -> Run:
    """The run folder: the named one, or the preset's own below `runs/`, whose name ends in the suffix or the kind."""
    return Run(named or ROOT / f"{Path(preset).stem}-{suffix or kind}", kind)


def open_images(settings: Preset, preset: str, console: Console) -> PreparedSet:
    """The prepared set that the settings name; warns where training would see but a small crop of its images.

    Raises:
        BadRequestError: It is not there: says what to prepare.
    """
    path = settings.data.path
    images = find_images(settings)
    if images is None:
        raise BadRequestError(
            f"preset {preset!r} trains on the prepared set {path}, which is not there",
            f"Prepare it (movq prepare IMAGES {path} --size {settings.vq.resolution}) or name another with --data.",
        )
    if not images.manifest.counts["val"]:
        raise BadRequestError(f"the prepared set {path} has no held-out images", "Prepare it from at least two images.")
    side = settings.vq.resolution
    if images.manifest.min_side > _ROOMY * side:
        console.warn(
            f"{path} has images of {images.manifest.min_side} pixels and more, of which training sees crops of {side}. "
            f"To see them whole, prepare them with --size {side}."
        )
    return images


def find_images(settings: Preset) -> PreparedSet | None:
    """The prepared set that the settings name; None where there is none yet."""
    return PreparedSet.open(settings.data.path) if (settings.data.path / MANIFEST).is_file() else None


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of each part of a model and in total."""
    parts = {_SPOKEN.get(name, name): _count(part) for name, part in model.named_children()}
    return {**parts, "total": _count(model)}


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """Print what a training command is about to do, as its result (`--dry-run`)."""
    rows = [(name, _spoken(value)) for name, value in _flat(plan)]
    console.table(plan, ["setting", "value"], rows)


def announce(plan: dict[str, Any], console: Console) -> None:
    """Say what a training command is about to do, a line a group."""
    for name, value in plan.items():
        text = ", ".join(f"{key} {_spoken(part)}" for key, part in value.items()) if isinstance(value, dict) else None
        console.log(f"{name.replace('_', ' ')}: {text or _spoken(value)}")


def length(train: TrainSettings, images: int | None, ranks: int) -> dict[str, Any]:
    """How long a run is and in which portions; null where that depends on images that are not there.

    Args:
        train: The settings.
        images: Or views of them, in an epoch; None = not known.
        ranks: That share each batch.
    """
    return {
        "steps": train.steps if images is None else train.total_steps(images),
        "steps_per_epoch": None if images is None else images // train.batch_size,
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "batch_size_at_once": train.batch_size // ranks // train.accumulate,
        "ranks": ranks,
        "learning_rate": train.learning_rate,
    }


def costs(cost: Cost) -> dict[str, Any]:
    """A step's cost on each rank, for a plan."""
    return {"memory_gib": cost.memory, "tflop_per_step": round(cost.flops / 1e12, 3)}


@contextmanager
def locked(run: Run, ranks: Ranks) -> Iterator[None]:
    """A run's folder, for this command alone: two that train in it would write over each other.

    Raises:
        BadRequestError: Another one is at work in it.
    """
    if not ranks.is_first:
        yield
        return
    with files.locked(run.folder, f"movq {COMMAND[run.kind]}"):
        yield


def train(stage: loop.Stage, run: Run, manifest: RunManifest, console: Console, plan: dict[str, Any]) -> None:
    """Train to the end, unless the run has been there already, and give its folder as the result."""
    figures: Metrics = {}
    if manifest.status == "finished":
        console.log(f"{run.folder} is finished already (step {manifest.step}); nothing to do")
    else:
        figures = loop.train(stage, run, manifest, console, tflop_per_step=plan["tflop_per_step"])
    console.result({"run": str(run.folder), "step": manifest.steps, **figures}, str(run.folder))


def judge(
    train: TrainSettings,
    preset: Preset,
    split: SplitName,
    limit: int,
    run: Run,
    weights: Path | None,
    device: torch.device,
    ranks: Ranks,
    console: Console,
) -> FIDEvaluator | None:
    """Who measures FID at intervals, where the settings ask for it; looks at the real images first.

    Args:
        train: How often.
        preset: Where the images are, and their side.
        split: Of the real images.
        limit: Real images, evenly spread.
        run: In whose folder their features are kept.
        weights: Folder with Inception's weights; None = torch hub's.
        device: Where.
        ranks: Who shares the work.
        console: For the progress.

    Raises:
        BadRequestError: Inception's weights are missing.
    """
    if not train.evaluate_every:
        return None
    images = ImageSet("real", str(preset.data.path), split, crop=preset.vq.resolution, limit=limit, console=console)
    return FIDEvaluator.of(images, run.folder / "features", weights, device, ranks, console)


def _flat(plan: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in plan.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{part}", number) for part, number in value.items())
        else:
            yield name, value


def _spoken(value: object) -> str:
    if value is None:
        return "depends on the images"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
