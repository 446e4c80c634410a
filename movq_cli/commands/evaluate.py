"""`movq evaluate`: the figures of one set of images against another, and the protocol behind them."""

from __future__ import annotations

import sys
from typing import Any

import torch

from movq_cli import devices, presets, ranks, settings, signals
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import cautions, extractors
from movq_cli.evaluation.codebook import codebook_figures
from movq_cli.evaluation.comparison import PAIRED, Comparison, EvaluationRequest, Metrics, conditions, report
from movq_cli.evaluation.image_sets import ImageSet


def evaluate(first: str, second: str, asked: EvaluationRequest, console: Console) -> None:
    """Compare two sets of images.

    Args:
        first: The real images: a folder, zip, tar, prepared set or .npz; or statistics, a file or a kept name.
        second: The fake images: samples, or reconstructions that bear their originals' names.
        asked: Everything else.
        console: Where the result and the warnings go.

    Raises:
        BadRequestError: Unusable inputs, no pairs, or weights that are missing or unusable; figures that need none have
            been given all the same.
        FailureError: A corrupt image where none may be, or a file that cannot be written.
    """
    target = None if asked.preset is None else presets.load(asked.preset).target
    if asked.out is not None and asked.out.is_dir():
        raise BadRequestError(f"{asked.out} is a folder", "--out names the JSON file to write.")
    if asked.gpus is not None and not ranks.is_launched():
        ranks.launch(sys.argv[1:], asked.gpus, asked.device)
        return
    with (
        ranks.joined_ranks(asked.device) as (mine, where),
        signals.interruptible("the features computed", launched=mine.world_size > 1),
        mine.long_barrier() as barrier,  # the last figures are rank 0's alone, and may take a while
        extractors.exact_float32(),
    ):
        comparison = Comparison(first, second, asked, mine, where, console)
        metrics = comparison.choose()
        reconstructed = bool(set(metrics) & set(PAIRED))
        for line in cautions.before(comparison.sides, metrics, paired=reconstructed):
            console.warn(line)
        figures = comparison.measure(metrics)
        for line in cautions.after(comparison.sides):
            console.warn(line)
        protocol = comparison.protocol
        if target is not None:
            protocol["published"] = {"preset": asked.preset} | _beside(figures, target, paired=reconstructed)
        if mine.is_first:
            report(figures, protocol, asked.out, console)
        barrier()
        comparison.complain()


def codebook(location: str, asked: EvaluationRequest, console: Console) -> None:
    """Give the codebook's figures for a set alone.

    Args:
        location: The set.
        asked: The tokenizer's run, split, crop and device.
        console: Where the result goes.

    Raises:
        BadRequestError: There are no images, or no such tokenizer.
    """
    device = devices.select(asked.device)
    images = ImageSet("real", location, asked.split, crop=asked.crop, strict=asked.strict, console=console)
    with torch.inference_mode():
        figures, used = codebook_figures(images, asked.run, asked.batch_size, device, console)
    protocol = conditions(device) | {"real": images.describe(), "codebook": used}
    report(figures, protocol | {"variants": dict.fromkeys(figures, used["variant"])}, asked.out, console)


def _beside(figures: Metrics, target: settings.Targets, *, paired: bool) -> dict[str, Any]:
    """The published ones of these figures with their source; FID is that of reconstructions where there are pairs."""
    known = target.model_dump(exclude_none=True)
    names = {name: "rfid" if name == "fid" and paired else name for name in figures}
    return {"source": target.source} | {name: known[there] for name, there in names.items() if there in known}
