"""What `train-vq` and `train-prior` do alike: say what they are about to do, train, and give the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from movq_cli.console import Console
from movq_cli.data.shards import MANIFEST, PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.runs import ROOT, Kind, Manifest, Run
from movq_cli.settings import Preset
from movq_cli.training import loop

_SPOKEN = {"quantize": "quantizer"}
"""Parts that are called otherwise than the parameters in published weights are."""

_ROOMY = 1.25
"""Images larger than this times the crop are rather seen in parts than whole; the field's own crops are within it."""


def run_folder(named: Path | None, preset: str, kind: Kind) -> Run:
    """The run folder: the named one, or the preset's own below `runs/`."""
    return Run(named or ROOT / f"{Path(preset).stem}-{kind}", kind)


def open_images(settings: Preset, preset: str, console: Console) -> PreparedSet:
    """The prepared set that the settings name; warns where training would see but a small crop of its images.

    Raises:
        BadRequestError: It is not there: says what to prepare.
    """
    path = settings.data.path
    if not (path / MANIFEST).is_file():
        raise BadRequestError(
            f"preset {preset!r} trains on the prepared set {path}, which is not there",
            f"Prepare it (movq prepare IMAGES {path} --size {settings.vq.resolution}) or name another with --data.",
        )
    images = PreparedSet.open(path)
    if not images.manifest.counts["val"]:
        raise BadRequestError(f"the prepared set {path} has no held-out images", "Prepare it from at least two images.")
    side = settings.vq.resolution
    if images.manifest.min_side > _ROOMY * side:
        console.warn(
            f"{path} has images of {images.manifest.min_side} pixels and more, of which training sees crops of {side}. "
            f"To see them whole, prepare them with --size {side}."
        )
    return images


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of each part of a model and in total."""
    parts = {_SPOKEN.get(name, name): _count(part) for name, part in model.named_children()}
    return {**parts, "total": _count(model)}


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """Print what a training command is about to do, as its result (`--dry-run`)."""
    rows = [
        (
            f"{name}.{part}" if isinstance(value, dict) else name,
            f"{number:,}" if isinstance(number, int) else str(number),
        )
        for name, value in plan.items()
        for part, number in (value.items() if isinstance(value, dict) else [("", value)])
    ]
    console.table(plan, ["setting", "value"], rows)


def train(stage: loop.Stage, run: Run, manifest: Manifest, console: Console) -> None:
    """Train to the end, unless the run has been there already, and give its folder as the result."""
    figures: dict[str, float] = {}
    if manifest.status == "finished":
        console.log(f"{run.folder} is finished already (step {manifest.step}); nothing to do")
    else:
        figures = loop.train(stage, run, manifest, console)
    console.result({"run": str(run.folder), "step": manifest.steps, **figures}, str(run.folder))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
