"""Repeat Figure 6a of the paper at a size that two CPU cores can train: what each part of MoVQ adds to VQGAN.

    python -m benchmarks.ablation cifar10            download, train the five rows, write benchmarks/results/ablation.*
    python -m benchmarks.ablation photos/ --side 64  the same on your own images

The rows are VQGAN, + 4 channels, + sinusoids, + constants, + Fourier. Each starts from benchmarks/ablation.yaml and
differs from the others only in what the presets of the paper (vqgan-ffhq ... ffhq) differ in: chunks, F0 and
modulation. All rows have the same images, steps, seed, learning rate, losses and revival of unused codes. The revival
hides how many codes a row would have lost without it.

Differences to the paper: images of 32 pixels, networks of a few million parameters, a few thousand steps, and L1 + L2
as the only loss of the images, without the perceptual and the adversarial loss. The paper gives the FID of each row,
which is meaningful only with these losses; this benchmark compares PSNR and SSIM of held-out images. At width 32 each
group of a GroupNorm has one channel, where the networks of the paper have four and more: plain norms then pass on
little of the mean color of an image, which costs every row.

Every row is trained by `movq train-vq`: an interrupted benchmark resumes when it is started again, and the results of
finished rows are only read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.commands import movq, read_log
from benchmarks.machine import machine
from movq_cli import devices, presets
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import MovqError
from movq_cli.evaluation import metrics
from movq_cli.files import atomic_file, atomic_write
from movq_cli.runs import Run
from movq_cli.settings import Preset

PRESET = Path(__file__).with_name("ablation.yaml")
RESULTS = Path(__file__).with_name("results")
HELD_OUT = 1000

Figures = dict[str, Any]
"""Results as they are written to the JSON file."""


class Row(NamedTuple):
    """A row of Figure 6a."""

    name: str
    label: str
    settings: tuple[str, ...]  # overrides of benchmarks/ablation.yaml
    paper: str  # preset of the same row at the size of the paper

    @property
    def paper_rfid(self) -> float | None:
        """The rFID of the row in the paper, on FFHQ at 256 pixels."""
        return presets.load(self.paper).target.rfid


_PLAIN = ("vq.initial_feature=quantized", "vq.modulation=null")
ROWS = (
    Row("vqgan", "VQGAN", ("vq.chunks=1", *_PLAIN), "vqgan-ffhq"),
    Row("multichannel", "+ 4 channels", _PLAIN, "multichannel-ffhq"),
    Row("sinusoid", "+ sinusoids", ("vq.initial_feature=sinusoid",), "sinusoid-ffhq"),
    Row("constant", "+ constants", ("vq.initial_feature=constant",), "constant-ffhq"),
    Row("fourier", "+ Fourier", ("vq.initial_feature=fourier",), "ffhq"),
)


class Bench(NamedTuple):
    """The settings that all rows share."""

    source: str
    side: int  # of the images, pixels
    overrides: tuple[str, ...]
    device: str | None
    work: Path

    @property
    def data(self) -> Path:
        """Folder of the prepared set."""
        return self.work / f"images-{self.side}"


def overrides(row: Row, side: int, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the overrides of benchmarks/ablation.yaml for a row; the settings of the row itself come last and win.

    Args:
        row: Row of the figure.
        side: Side of the images, pixels.
        extra: Overrides for every row.
    """
    grid = side // presets.load(str(PRESET)).vq.factor
    size = (f"vq.resolution={side}", f"vq.attention_resolutions=[{grid}]")
    return (*size, *extra, *row.settings)


def resolve(row: Row, side: int, extra: Sequence[str] = ()) -> Preset:
    """Return the settings of a row; the arguments are those of `overrides`.

    Raises:
        BadRequestError: The settings contradict each other.
    """
    return presets.load(str(PRESET), overrides(row, side, extra))


def measure(bench: Bench, row: Row) -> Figures:
    """Train a row or resume it, and return its results."""
    changes = overrides(row, bench.side, bench.overrides)
    settings = resolve(row, bench.side, bench.overrides)
    options = ["--preset", str(PRESET), *(word for change in changes for word in ("-o", change))]
    plan = movq("train-vq", *options, "--dry-run")
    run = Run(bench.work / f"{row.name}-{digest(settings)}", "vq")
    device = [] if bench.device is None else ["--device", bench.device]
    movq("train-vq", *options, *device, "--data", bench.data, "--run", run.folder)
    curve, seconds = read_log(run.log, settings.train_vq.batch_size)
    return {
        "row": row.name,
        "label": row.label,
        "settings": list(row.settings),
        "parameters": plan["parameters"]["total"],
        **{name: value for name, value in curve[-1].items() if name != "step"},
        "seconds": round(seconds),
        "paper_rfid": row.paper_rfid,
        "validations": curve,
    }


def digest(settings: Preset) -> str:
    """Return eight digits that identify the settings: runs with other settings get other folders."""
    text = settings.model_dump_json(include={"vq", "train_vq"})
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def report(bench: Bench) -> Figures:
    """Train every row, and return the results with their protocol and machine.

    Raises:
        BadRequestError: A setting or the device is invalid.
    """
    for row in ROWS:
        resolve(row, bench.side, bench.overrides)  # an invalid setting fails before any work
    device = devices.select(bench.device)
    movq("prepare", bench.source, bench.data, "--size", str(bench.side), "--val", str(HELD_OUT))
    return {
        "rows": [measure(bench, row) for row in ROWS],
        "protocol": protocol(bench),
        "machine": machine(device),
    }


def protocol(bench: Bench) -> Figures:
    """Return how the results were made."""
    settings = resolve(ROWS[-1], bench.side, bench.overrides)
    train, counts = settings.train_vq, PreparedSet.open(bench.data).manifest.counts
    return {
        "source": Path(bench.source).name,
        "images": {"train": counts["train"], "held_out": counts["val"]},
        "side": bench.side,
        "codes": {"grid": settings.vq.code_shape.height, "codebook_size": settings.vq.codebook_size},
        "steps": train.total_steps(counts["train"]),
        "batch_size": train.batch_size,
        "seed": train.seed,
        "learning_rate": train.learning_rate,
        "losses": {name: value for name, value in train.model_dump().items() if name.endswith("_weight")},
        "revive_every": train.revive_every,
        "precision": train.precision,
        "overrides": list(bench.overrides),
        "variants": {"psnr": metrics.PSNR.variant, "ssim": metrics.SSIM.variant},
    }


def show(figures: Figures) -> None:
    """Print the rows as a table."""
    table = Table("row", "PSNR", "SSIM", "used", "perplexity", "parameters", "paper\nrFID")
    for row in figures["rows"]:
        table.add_row(
            row["label"],
            f"{row['psnr']:.2f}",
            f"{row['ssim']:.4f}",
            f"{row['usage']:.1%}",
            f"{row['perplexity']:.0f}",
            f"{row['parameters']:,}",
            f"{row['paper_rfid']}",
        )
    Console().print(table)


def draw(figures: Figures, path: Path) -> None:
    """Plot the PSNR during training, and the final PSNR and SSIM of each row."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows, made = figures["rows"], figures["protocol"]
    figure, (course, psnr, ssim) = plt.subplots(
        1, 3, figsize=(13, 4), width_ratios=(3, 2, 2), layout="constrained", dpi=120
    )
    colors = [f"C{number}" for number in range(len(rows))]
    for row, color in zip(rows, colors, strict=True):
        steps = [point["step"] for point in row["validations"]]
        course.plot(steps, [point["psnr"] for point in row["validations"]], ".-", color=color, label=row["label"])
    course.set(xlabel="step", ylabel="PSNR, dB", title="held-out PSNR while training")
    course.legend()
    labels = [f"{row['label']}\n(paper: rFID {row['paper_rfid']})" for row in rows]
    for axes, name, form in ((psnr, "psnr", "{:.2f} dB"), (ssim, "ssim", "{:.4f}")):
        values = [row[name] for row in rows]
        room = max(values) - min(values)
        for place, (value, color) in enumerate(zip(values, colors, strict=True)):
            axes.plot(value, place, "o", color=color, markersize=9)
            axes.annotate(form.format(value), (value, place), xytext=(0, 8), textcoords="offset points", ha="center")
        axes.set(xlim=(min(values) - 0.3 * room, max(values) + 0.3 * room), ylim=(len(rows) - 0.5, -0.7))
        axes.set_yticks(range(len(rows)), labels if axes is psnr else [""] * len(rows))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", alpha=0.3)
    psnr.set(title="PSNR at the end, dB")
    ssim.set(title="SSIM at the end")
    images = made["images"]
    figure.suptitle(
        f"Figure 6a at a small scale: {made['source']}, {made['side']} pixels, {made['steps']:,} steps of "
        f"{made['batch_size']}, {images['held_out']:,} held-out images"
    )
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def main() -> None:
    """Train the unfinished rows, then write and print the results."""
    parser = argparse.ArgumentParser(
        description="Repeat Figure 6a of the paper at a small scale: PSNR and SSIM of each row."
    )
    parser.add_argument(
        "source",
        help="source of images for `movq prepare`: a folder, an archive, or the name of a public set such as cifar10",
    )
    parser.add_argument("--side", type=int, default=32, help="side of the images, pixels [default: 32]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results [default: benchmarks/results]")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/ablation"), help="folder of the runs [default: runs/ablation]"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... [default: cuda where there is one]")
    parser.add_argument(
        "-o",
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for a setting of every row, e.g. train_vq.steps=5000; repeatable",
    )
    arguments = parser.parse_args()
    try:
        extra = tuple(arguments.overrides)
        figures = report(Bench(arguments.source, arguments.side, extra, arguments.device, arguments.work))
        atomic_write(arguments.out / "ablation.json", (json.dumps(figures, indent=2) + "\n").encode())
        draw(figures, arguments.out / "ablation.png")
    except MovqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    show(figures)


if __name__ == "__main__":
    main()
