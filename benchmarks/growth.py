"""Measure how the cost grows with resolution, batch size, codebook size, decoding steps and number of images.

    python -m benchmarks.growth                                               all curves, and the memory of commands
    python -m benchmarks.growth --only commands --images 4000 20000 60000     the memory of commands for large sets

Every curve is one piece of work at growing sizes: the forward and backward pass of the tokenizer (preset `ffhq`), the
one of the quantizer, and the decoding of the masked prior (`ffhq` on CUDA, `digits` on the CPU). A power of the size is
fitted to the times. The floor is the arithmetic at the rate of one large matrix product. The results name the operator
that takes most of the time at the largest size. Nothing is compiled, because every point has another shape.

The memory of complete commands is measured at several numbers of images, as `benchmarks.command_memory` describes it.
With --only, the other part of the results file stays as it is.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks import command_memory, measure
from benchmarks.autoencoder import Pass
from benchmarks.machine import machine
from benchmarks.measure import Contender
from benchmarks.quantizer import CHANNELS, CHUNKS, inputs, our_pass
from movq_cli import Tokenizer, devices, presets
from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.models.quantizers.vector import VectorQuantizer
from movq_cli.settings import SampleSettings


@dataclass(frozen=True)
class Sizes:
    """The sizes of each curve, and the sizes that are held fixed."""

    side: tuple[int, ...]  # side of the images in pixels, for `batch[0]` images
    batch: tuple[int, ...]  # number of images of `side[0]` pixels
    codebook: tuple[int, ...]  # number of entries, for `vectors` images of 16 x 16 positions
    vectors: int
    steps: tuple[int, ...]  # decoding steps, for `images[0]` images
    images: tuple[int, ...]  # number of images drawn at once, in 8 steps


SIZES = {
    "cuda": Sizes((128, 256, 512), (4, 8, 16, 32), (1024, 4096, 16384, 65536), 16, (4, 8, 16, 32), (16, 32, 64, 128)),
    "cpu": Sizes((64, 128, 256), (1, 2, 4, 8), (256, 1024, 4096, 16384), 2, (2, 4, 8, 16, 32), (16, 32, 64, 128)),
}

Make = Callable[[int], Callable[[], object]]
"""A function that takes a size and returns the work of that size."""


def report(device: torch.device, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Run the benchmark and return its results.

    Args:
        device: Device of the networks.
        sizes: Sizes of each curve.
        repeats: Number of timed runs of each point.
    """
    precision = "bf16" if device.type == "cuda" else "float32"
    rates, curves = [devices.matrix_rate(device, precision)], []
    for each in works(device, precision, sizes):
        curves.append(curve(*each, device, repeats))
        rates.append(devices.matrix_rate(device, precision))  # clocks vary over minutes: the best rate counts
    for point in (point for one in curves for point in one["points"]):
        point |= {"matrix_flops_per_second": max(rates), "floor_seconds": point["flops"] / max(rates)}
    return {"precision": precision, "curves": curves, "machine": machine(device)}


def works(device: torch.device, precision: str, sizes: Sizes) -> Iterator[tuple[str, str, tuple[int, ...], Make]]:
    """Yield the name of the work, the name of the size, its values and the work by size, for each curve."""
    torch.manual_seed(0)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    tokenizer = Tokenizer(presets.load("ffhq").vq).to(device).to(memory_format=layout)

    def tokenizer_pass(side: int, images: int) -> Callable[[], object]:
        return Pass(tokenizer, torch.rand(images, 3, side, side, device=device), precision, backward=True)

    def quantizer_pass(entries: int) -> Callable[[], object]:
        quantizer = VectorQuantizer(entries, CHANNELS // CHUNKS).to(device)
        return partial(our_pass, quantizer, *inputs(quantizer, sizes.vectors))

    yield "tokenizer", "side", sizes.side, partial(tokenizer_pass, images=sizes.batch[0])
    yield "tokenizer", "batch", sizes.batch, partial(tokenizer_pass, sizes.side[0])
    yield "quantizer", "codebook", sizes.codebook, quantizer_pass
    preset = presets.load("ffhq" if device.type == "cuda" else "digits")
    prior = MaskedPrior(preset.prior, preset.vq.code_shape).to(device).eval()
    devices.cast_linear_layers(prior, device, precision)

    def drawing(steps: int, images: int) -> Callable[[], object]:
        settings = SampleSettings(steps=steps)
        classes = torch.arange(images, device=device) % preset.prior.classes if preset.prior.classes else None

        def draw() -> object:
            with devices.autocast(device, precision):
                return prior.decode(range(images), classes, settings)

        return draw

    yield "sampling", "steps", sizes.steps, partial(drawing, images=sizes.images[0])
    yield "sampling", "images", sizes.images, partial(drawing, 8)


def curve(
    what: str, size: str, values: tuple[int, ...], make: Make, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Return one curve: its points without floors, the exponents of time and memory, and the dominant operator."""
    points: list[dict[str, Any]] = []
    for value in values:
        contender = Contender(f"{what}, {size} {value}", make(value))
        measure.race([contender], device, repeats)
        points.append({"value": value, **measure.figures(contender, None, rate=math.inf)})
        operator, share = dominant(contender.work, device)
        del contender
        gc.collect()
    times, memory = ([point[key] for point in points] for key in ("seconds", "memory_bytes"))
    return {
        "what": what,
        "size": size,
        "exponent": exponent(values, times),
        "memory_exponent": exponent(values, memory),
        "dominant": operator,
        "dominant_share": share,
        "points": points,
    }


def exponent(values: tuple[int, ...], costs: list[float]) -> float:
    """Return the p for which value^p fits the costs best up to a factor, by least squares of the logarithms."""
    slope, _ = np.polyfit(np.log(values), np.log(costs), 1)
    return float(slope)


def dominant(work: Callable[[], object], device: torch.device) -> tuple[str, float]:
    """Return the operator or kernel with the largest own time in a piece of work, and its share of the time."""
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as recorded:
        devices.seconds(work, device)
    times = {
        event.key: event.self_device_time_total if on_cuda else event.self_cpu_time_total
        for event in recorded.key_averages()
    }
    name = max(times, key=lambda key: times[key])
    return name, times[name] / sum(times.values())


def show(figures: dict[str, Any]) -> None:
    """Print the results as tables."""
    for one in figures["curves"]:
        measure.show(
            f"{one['what']}, by {one['size']}",
            [{**point, "name": f"{one['size']} {point['value']}"} for point in one["points"]],
        )
    table = Table("", "time grows with", "memory with", "of the largest size most time goes to", title="growth")
    for one in figures["curves"]:
        table.add_row(*measure.growth_cells(one))
    Console(width=measure.WIDTH).print(table)


def plot(figures: dict[str, Any], path: Path) -> None:
    """Plot the times and floors of every curve on logarithmic axes."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    curves = figures["curves"]
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.2 * len(curves), 3.2), layout="constrained")
    for axis, one in zip(axes, curves, strict=True):
        values = [point["value"] for point in one["points"]]
        for key, style in (("seconds", "o-"), ("floor_seconds", "--")):
            axis.plot(values, [point[key] for point in one["points"]], style, label=key.replace("_", " "))
        axis.set(
            xscale="log", yscale="log", xlabel=one["size"], title=f"{one['what']}: {one['size']}^{one['exponent']:.2f}"
        )
        axis.set_xticks(values, values)
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run the benchmark, print its tables, and write its results and its plot."""
    parser = measure.parser("Measure how the cost grows.", repeats=3)
    parser.add_argument("--only", choices=("curves", "commands"), help="part to measure [default: both]")
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        default=command_memory.NUMBERS,
        help="two or more numbers of images, ascending, at which the memory of commands is measured",
    )
    arguments = parser.parse_args()
    if len(arguments.images) < 2 or list(arguments.images) != sorted(set(arguments.images)):
        parser.error("--images needs two or more numbers, ascending")
    device = devices.select(arguments.device)
    if arguments.only != "commands":
        figures = report(device, SIZES[device.type], arguments.repeats)
        show(figures)
        save(figures, arguments.out, device)
        skipped = measure.missing(["matplotlib"])
        if skipped:
            print(f"plot skipped: {skipped}")
        else:
            plot(figures, arguments.out / f"growth-{device.type}.png")
    if arguments.only != "curves":
        skipped = command_memory.why_not()
        if skipped:
            print(f"memory of commands skipped: {skipped}")
            return
        for commands in command_memory.reports(device, arguments.images):
            command_memory.show(commands)
            save({"commands": commands}, arguments.out, device)


def save(figures: dict[str, Any], out: Path, device: torch.device) -> None:
    """Write a part of the results into the results file; its other part stays as it is."""
    path = out / f"growth-{device.type}.json"
    before = json.loads(path.read_text()) if path.is_file() else {"machine": machine(device)}
    measure.save(before | figures, out, "growth", device)


if __name__ == "__main__":
    main()
