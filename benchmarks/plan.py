"""Plan the trainings of the paper's tables: the steps, arithmetic, hours, memory and disk space of each.

    python -m benchmarks.plan                              at half of the arithmetic of an A100
    python -m benchmarks.plan --tflops 989 --share 0.2     at a fifth of the arithmetic of an H100

The arithmetic of a step is counted and not measured, and the hours are the arithmetic over a share of the GPU's rate.
The share is an assumption: a compiled training step of preset ffhq reached 20% of the rate of a large matrix product on
an H200 (docs/measured.md). Memory is that of one GPU that takes the complete batch in bf16, not compiled. Disk is that
of the cached codes; FFHQ's prepared set has about 6 GB, and ImageNet's about 150 GB.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from movq_cli import presets
from movq_cli.settings import Preset
from movq_cli.training import cost, fit
from movq_cli.training.cost import Cost
from movq_cli.training_settings import TrainSettings

IMAGES = {"ffhq": 60_000, "imagenet": 1_281_167}
"""Training images of each data set: FFHQ without its 10,000 validation images, and ImageNet's training split."""

MODES = {
    "ffhq": ("mask", "auto"),
    "imagenet": ("mask", "auto"),
    **dict.fromkeys(("vqgan-ffhq", "multichannel-ffhq", "sinusoid-ffhq", "constant-ffhq"), ("mask",)),
    **dict.fromkeys(("ffhq-1ch", "ffhq-2ch", "ffhq-8ch"), ("mask",)),
    **dict.fromkeys(("vqgan-imagenet", "vqgan-imagenet-16384", "imagenet-16384"), ()),
}
"""Presets of the tables, and the modes of their priors."""

_BF16 = ("train_vq.precision=bf16", "train_prior.precision=bf16")
_CODE_BYTES = 2
_DEVICE = torch.device("cpu")  # The arithmetic and the sizes of tensors are those of any device.


class Row(NamedTuple):
    """The cost of one training."""

    name: str
    steps: int
    exaflops: float
    """Arithmetic of the complete training, 1e18 operations."""
    memory_gib: float
    """Peak memory of one GPU."""
    disk_gib: float
    """Cached codes."""


def rows() -> Iterator[Row]:
    """Yield the trainings of all tables in the order of `MODES`."""
    for name, modes in MODES.items():
        settings = presets.load(name, _BF16)
        images = IMAGES["imagenet" if "imagenet" in name else "ffhq"]
        vq = settings.train_vq
        yield _row(f"{name}, stage 1", vq, images, cost.of_tokenizer(settings.vq, vq, _DEVICE, 1), 0)
        for mode in modes:
            yield prior_row(name, presets.load(name, [*_BF16, f"prior.mode={mode}"]), images)


def prior_row(name: str, settings: Preset, images: int) -> Row:
    """Return the training of a prior.

    Args:
        name: Name of the preset.
        settings: Its settings, with the mode of the prior.
        images: Number of training images, each of which has the views of the settings.
    """
    views, shape = images * settings.views.count, settings.vq.code_shape
    step = cost.of_prior(settings.prior, shape, settings.train_prior, _DEVICE, 1)
    return _row(f"{name}, {settings.prior.mode}", settings.train_prior, views, step, views * shape.codes * _CODE_BYTES)


def _row(name: str, train: TrainSettings, images: int, step: Cost, disk: int) -> Row:
    steps = train.total_steps(images)
    return Row(name, steps, steps * step.flops / 1e18, fit.needed_memory(step), disk / 2**30)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The cost of each training of the paper's tables.")
    parser.add_argument("--tflops", type=float, default=312, help="rate of the device in bf16 [default: 312, an A100]")
    parser.add_argument("--share", type=float, default=0.2, help="share of the rate that a training reaches")
    arguments = parser.parse_args()
    headings = ("training", "steps", "EFLOP", "device-hours", "GiB of GPU memory", "GiB of codes")
    table = Table(title=f"{arguments.tflops:g} TFLOP/s, of which a training reaches {arguments.share:.0%}")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "training" else "right")
    total = 0.0
    for row in rows():
        hours = row.exaflops * 1e6 / (arguments.tflops * arguments.share * 3600)
        total += hours
        cells = (
            f"{row.steps:,}",
            f"{row.exaflops:,.0f}",
            f"{hours:,.0f}",
            f"{row.memory_gib:.0f}",
            f"{row.disk_gib:.1f}",
        )
        table.add_row(row.name, *cells)
    Console(width=120).print(table)
    print(f"all trainings together: {total:,.0f} device-hours")


if __name__ == "__main__":
    main()
