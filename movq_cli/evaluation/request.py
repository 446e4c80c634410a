"""The request that `movq evaluate` makes of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from movq_cli.data.shards import SplitName
    from movq_cli.image_size import ImageSize


@dataclass(frozen=True)
class EvaluationRequest:
    """The options of `movq evaluate`, beside the two sets of images."""

    metrics: tuple[str, ...]
    """Keys of metrics; empty requests every metric that the inputs and the available weights allow."""
    require_weights: bool
    """Whether missing weights are downloaded, and are an error where that fails; otherwise the metric is left out."""
    copies: Path | None
    """Picture of the fake images that are nearest to real ones; None = they are not searched for."""
    codebook: bool
    """Whether to measure how the real images use a tokenizer's codebook."""
    run: Path | None
    """Run folder or weight file of that tokenizer; None = the newest finished run."""
    split: SplitName
    """Split of a prepared set."""
    crop: ImageSize | None
    """Size of the central parts that are compared; None = images as they are."""
    strict: bool
    """Whether a corrupt image is an error; otherwise it is left out."""
    batch_size: int
    """Number of images in a batch."""
    weights: Path | None
    """Folder of pretrained weights, searched before torch hub's; None = torch hub's alone."""
    cache: Path
    """Folder of the feature cache and of named statistics."""
    preset: str | None
    """Name of the preset whose published values are shown; None = none."""
    device: str | None
    """Name of the device; None = CUDA if it is available, the CPU otherwise."""
    gpus: int | None
    """Number of processes to start, one for each GPU; None = this process alone, or those that torchrun started."""
    out: Path | None
    """File for the result as JSON."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Color that transparent pixels of images that are not prepared are composited over, RGB in 0..255."""
    requires_background: bool = False
    """Whether it is an error that all sets are prepared, because the user has named a background."""
    requires_splits: bool = False
    """Whether it is an error that no set has splits, because the user has named one."""
