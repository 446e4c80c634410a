"""Train the presets photos-* on images: what the discriminator adds, MoVQ against VQGAN, and samples by class.

    python -m benchmarks.photos photos/                      all rows, to benchmarks/results/photos-32-photos.json
    python -m benchmarks.photos cifar10.zip -o train_vq.steps=2400     shorter
    python -m benchmarks.photos photos/ --rows photos no-discriminator

The rows of stage 1 share images, steps, seed and losses:

- photos: the preset as it is.
- straight-through: the preset with the straight-through gradient in place of the rotation trick.
- no-discriminator: from the checkpoint of `photos` before its discriminator, without one.
- vqgan-discriminator: from the same checkpoint, with the settings of VQGAN's discriminator: weight 0.8, no warm-up, the
  tokenizer's learning rate, no limit of the adaptive weight.
- vqgan: VQGAN's architecture (one chunk, no modulation) with the discriminator of `photos`.

The row `prior` trains a prior on the codes of `photos`, conditioned on the classes if there are any, and compares as
many samples as there are held-out images with these, without and with guidance. The row `copies` compares these samples
with all training images, whose features take long without a GPU.

PSNR, SSIM, LPIPS and FID need the weights that `movq weights --fetch` downloads. Each row is made by the commands of
movq: an interrupted benchmark resumes when it is started again. Rows that are left out keep their last results.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.commands import movq, read_log
from benchmarks.machine import machine
from movq_cli import presets
from movq_cli.data.shards import PreparedSet
from movq_cli.files import atomic_write
from movq_cli.runs import Run
from movq_cli.settings import Preset

RESULTS = Path(__file__).with_name("results")
STAGE_1 = ("photos", "straight-through", "no-discriminator", "vqgan-discriminator", "vqgan")
ROWS = (*STAGE_1, "prior", "copies")
GUIDANCE = (0.0, 1.0)

_VQGAN = ("vq.chunks=1", "vq.modulation=null", "vq.initial_feature=quantized")
_VQGAN_DISCRIMINATOR = (
    "train_vq.adversarial_weight=0.8",
    "train_vq.discriminator_warmup=0",
    "train_vq.discriminator_learning_rate=null",
    "train_vq.adaptive_weight_limit=10000",
)


class Bench(NamedTuple):
    """The settings that all rows share."""

    source: str
    preset: str
    overrides: tuple[str, ...]
    held_out: int
    work: Path
    options: tuple[str, ...]  # of every training command: weights and device

    @property
    def data(self) -> Path:
        """Folder of the prepared set."""
        return self.work / "images"

    @property
    def settings(self) -> Preset:
        """Settings of the row `photos`."""
        return presets.load(self.preset, self.overrides)

    def overrides_for(self, *sections: str) -> tuple[str, ...]:
        """Return the overrides of these sections: a command refuses those that have no effect on it."""
        return tuple(override for override in self.overrides if override.partition(".")[0] in sections)

    def run(self, row: str) -> Run:
        """Return the run of a row of stage 1."""
        return Run(self.work / row, "vq")

    def samples(self, name: str) -> Path:
        """Return the folder of the samples of this name."""
        return self.work / f"samples-{name}"

    def report(self, folder: Path, prefix: str = "") -> Path:
        """Return the file of the results in a folder, which names the preset and the source of the images."""
        return folder / f"{prefix}{Path(self.preset).stem}-{Path(self.source).stem}.json"


def train(bench: Bench, row: str, changes: tuple[str, ...] = (), origin: str | None = None) -> dict[str, Any]:
    """Train a row of stage 1 or resume it, and return its results."""
    overrides = (*bench.overrides_for("data", "vq", "train_vq"), *changes)
    settings = [word for change in overrides for word in ("-o", change)]
    start = [] if origin is None else ["--from", origin]
    run = bench.run(row)
    movq(
        "train-vq",
        "--preset",
        bench.preset,
        *settings,
        *start,
        *bench.options,
        "--data",
        bench.data,
        "--run",
        run.folder,
    )
    validations, seconds = read_log(run.log, bench.settings.train_vq.batch_size)
    last = [json.loads(line) for line in run.log.read_text().splitlines()]
    trained = [record["training"] for record in last if "training" in record][-1]
    manifest = run.read()
    return {
        "row": row,
        "started_from": origin,
        "settings": list(changes),
        **validations[-1],
        "best": {"step": manifest.best_step, manifest.best_by: manifest.best_score},
        **{name: trained[name] for name in ("logits_real", "logits_fake", "adaptive_weight") if name in trained},
        "seconds": round(seconds),
        "validations": validations,
    }


def stage_1(bench: Bench, row: str) -> dict[str, Any]:
    """Return the results of a row of stage 1."""
    if row == "photos":
        return train(bench, row)
    if row == "straight-through":
        return train(bench, row, ("train_vq.quantizer_gradient=straight-through",))
    if row == "vqgan":
        return train(bench, row, _VQGAN)
    changes = _VQGAN_DISCRIMINATOR if row == "vqgan-discriminator" else ("train_vq.adversarial_weight=0",)
    photos = bench.run("photos")
    milestones = photos.kept_steps()  # There is none if the discriminator is trained from the first step on.
    return train(bench, row, changes, f"{photos.folder}@{milestones[0]}" if milestones else None)


def train_prior(bench: Bench, tokenizer: str, row: str, changes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train a prior or resume it, and return the results of its last validation.

    Args:
        bench: Settings of all rows.
        tokenizer: Row of stage 1 whose codes the prior learns.
        row: Name of the prior's run folder.
        changes: Overrides of this prior.
    """
    classes = len(PreparedSet.open(bench.data).manifest.classes)
    overrides = (*bench.overrides_for("data", "prior", "views", "train_prior"), f"prior.classes={classes}", *changes)
    settings = [word for override in overrides for word in ("-o", override)]
    trained = ("--tokenizer", bench.run(tokenizer).folder, "--run", bench.work / row)
    movq("train-prior", "--preset", bench.preset, *settings, *bench.options, "--data", bench.data, *trained)
    validations, seconds = read_log(Run(bench.work / row, "prior").log, bench.settings.train_prior.batch_size)
    return {"row": row, **validations[-1], "seconds": round(seconds)}


def sample(bench: Bench, prior: str, name: str, changes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Draw as many samples as there are held-out images, or the missing ones, and return their number and FID.

    Args:
        bench: Settings of all rows.
        prior: Name of the prior's run folder.
        name: Name of the samples, which is part of that of their folder.
        changes: Overrides of the section `sample` of the preset, for these samples alone.
    """
    overrides = (change.partition("=") for change in (*bench.overrides_for("sample"), *changes))
    settings = [f"--{key.removeprefix('sample.').replace('_', '-')}={value}" for key, _, value in overrides]
    samples, count = bench.samples(name), PreparedSet.open(bench.data).manifest.counts["val"]
    movq("sample", samples, "--run", bench.work / prior, "--n", str(count), *settings)
    measured = movq("evaluate", bench.data, samples, "--fid", "--split", "val", *bench.options)
    return {"images": count, "fid": measured["fid"]}


def stage_2(bench: Bench) -> dict[str, Any]:
    """Return the results of the row of stage 2, with those of its samples."""
    results = train_prior(bench, "photos", "prior")
    sampled = (
        {"guidance": guidance, **sample(bench, "prior", f"{guidance:g}", (f"sample.guidance={guidance}",))}
        for guidance in strengths(bench)
    )
    return {**results, "samples": list(sampled)}


def copies(bench: Bench) -> dict[str, Any]:
    """Return the share of the samples of each guidance that may be copies of training images, and draw the nearest."""
    shares = {}
    for guidance in strengths(bench):
        name = f"{guidance:g}"
        metrics = ("--fid", "--copies", str(bench.work / f"copies-{name}.png"))
        measured = movq("evaluate", bench.data, bench.samples(name), *metrics, "--split", "train", *bench.options)
        shares[name] = measured["copies"]
    return {"row": "copies", "of_guidance": shares}


def strengths(bench: Bench) -> tuple[float, ...]:
    """Return the guidance of the samples; there is none without classes."""
    return GUIDANCE if PreparedSet.open(bench.data).manifest.classes else GUIDANCE[:1]


def prepare(bench: Bench) -> None:
    """Prepare the images that all rows share, or verify them."""
    size = "{}x{}".format(*bench.settings.vq.image_size)
    movq("prepare", bench.source, bench.data, "--size", size, "--val", str(bench.held_out))


def record(bench: Bench, path: Path, rows: dict[str, Any]) -> None:
    """Write the results of all rows to a file, with their protocol and the machine."""
    device = next((after for name, after in pairwise(bench.options) if name == "--device"), "cpu")
    results = {
        "protocol": {
            "source": Path(bench.source).name,
            "preset": bench.preset,
            "overrides": list(bench.overrides),
            "images": PreparedSet.open(bench.data).manifest.counts,
        },
        "rows": rows,
        "machine": machine(torch.device(device)),
    }
    atomic_write(path, (json.dumps(results, indent=2) + "\n").encode())


def recorded(path: Path) -> dict[str, Any]:
    """Return the rows that a file of results has; empty if there is no file."""
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.is_file() else {}
    return rows


def show(results: dict[str, Any]) -> None:
    """Print the rows as a table."""
    table = Table("row", "rFID", "LPIPS", "PSNR", "SSIM", "color error", "real - fake", "weight")
    for name in STAGE_1:
        row = results["rows"].get(name)
        if row is None:
            table.add_row(name, *["not measured"] * 7)
            continue
        margin = f"{row['logits_real'] - row['logits_fake']:.2f}" if "logits_real" in row else ""
        weight = f"{row['adaptive_weight']:.2f}" if "adaptive_weight" in row else ""
        values = (f"{row.get(key, float('nan')):.{digits}f}" for key, digits in _COLUMNS.items())
        table.add_row(name, *values, margin, weight)
    Console().print(table)
    for sampled in results["rows"].get("prior", {}).get("samples", ()):
        print(f"prior, guidance {sampled['guidance']:g}: FID {sampled['fid']:.1f} of {sampled['images']} samples")
    for guidance, share in results["rows"].get("copies", {}).get("of_guidance", {}).items():
        print(f"prior, guidance {guidance}: {share:.1%} of the samples may be copies of training images")


_COLUMNS = {"rfid": 1, "lpips": 4, "psnr": 2, "ssim": 4, "color_error": 2}
"""Columns of the table, and their decimals."""


_STAGE_2 = {"prior": stage_2, "copies": copies}
"""Rows that need the prior, and the functions that make them."""


def main() -> None:
    """Train the unfinished rows, then write and print the results."""
    parser = argument_parser("Train the presets photos-* and compare their discriminators.", Path("runs/photos"))
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=ROWS, help="rows to train [default: all]")
    given = parser.parse_args()
    bench = bench_of(given)
    prepare(bench)
    path = bench.report(given.out)
    for row in given.rows:
        measured = _STAGE_2[row](bench) if row in _STAGE_2 else stage_1(bench, row)
        # Another process may have written other rows in the meantime.
        record(bench, path, {**recorded(path), row: measured})
    if not path.is_file():
        sys.exit("nothing measured: name a row with --rows")
    show(json.loads(path.read_text()))


def argument_parser(description: str, work: Path) -> argparse.ArgumentParser:
    """Return a parser with the arguments from which `bench_of` makes the settings of all rows.

    Args:
        description: Description of the command.
        work: Default folder of the runs.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("source", help="source of images for `movq prepare`: a folder, an archive, or a public set")
    parser.add_argument("--preset", default="photos-32", help="preset of the rows [default: photos-32]")
    parser.add_argument(
        "-o",
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for a setting of every row, e.g. train_vq.steps=2400; repeatable",
    )
    parser.add_argument("--held-out", type=int, default=1000, help="number of held-out images [default: 1000]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results [default: benchmarks/results]")
    parser.add_argument("--work", type=Path, default=work, help="folder of the runs")
    parser.add_argument("--weights", help="folder with the pretrained weights [default: torch hub's]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... [default: cuda where there is one]")
    return parser


def bench_of(given: argparse.Namespace) -> Bench:
    """Return the settings that all rows share from the arguments of the command."""
    named = {"--weights": given.weights, "--device": given.device}
    options = tuple(word for name, value in named.items() if value for word in (name, value))
    return Bench(given.source, given.preset, tuple(given.overrides), given.held_out, given.work, options)


if __name__ == "__main__":
    main()
