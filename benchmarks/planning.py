"""Compare the expected time and memory of trainings with those of real ones.

    python -m benchmarks.planning SOURCE      SOURCE is anything that `movq prepare` reads, at least 32 pixels a side

Each row is a preset with changes. `movq train-vq --dry-run` gives the expected seconds per step and the expected peak
memory, and a real run of some steps gives those that it took: from the log, without the lines until the first one that
has a full cache, and from the system, which reports the peak of the process. Dry run and real run alternate, and the
numbers are medians. Random weights stand in for those of VGG-16, which cost the same; so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.machine import machine
from benchmarks.training import draw_lpips

ROWS: dict[str, tuple[str, str, tuple[str, ...], int]] = {
    "digits, stage 1": ("train-vq", "digits", (), 40),
    "digits, stage 1, batch 256": ("train-vq", "digits", ("train_vq.batch_size=256",), 9),
    "photos-32, stage 1, before the discriminator": ("train-vq", "photos-32", ("train_vq.adversarial_weight=0",), 24),
    "photos-32, stage 1, with the discriminator": ("train-vq", "photos-32", ("train_vq.discriminator_start=0",), 24),
    "photos-32, stage 1, batch 64 in float32": (
        "train-vq",
        "photos-32",
        ("train_vq.batch_size=64", "train_vq.precision=float32", "train_vq.discriminator_start=0"),
        9,
    ),
    "photos-32, stage 2": ("train-prior", "photos-32", (), 24),
    "photos-32, stage 2, batch 512": ("train-prior", "photos-32", ("train_prior.batch_size=512",), 9),
}
"""Command, preset, changed settings and number of real steps of each row, by its name."""


def report(source: str, repeats: int) -> dict[str, Any]:
    """Run the benchmark on the images of a source and return its results."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        draw_lpips(work)
        movq(work, "prepare", source, "data", "--size", "32", "--no-labels")
        for preset in ("digits", "photos-32"):
            changes = ("train_vq.perceptual_weight=0", "train_vq.adversarial_weight=0", "prior.classes=0")
            movq(work, *options("train-vq", preset, (*changes, "train_vq.steps=1"), work), "--run", f"runs/{preset}")
        rows = [row(name, work, repeats) for name in ROWS]
    return {"rows": rows, "machine": machine(torch.device("cpu"))}


def row(name: str, work: Path, repeats: int) -> dict[str, Any]:
    """Return the expected and the real time and memory of a row."""
    command, preset, changes, steps = ROWS[name]
    section = command.replace("-", "_")
    length = (f"{section}.epochs=null", f"{section}.steps={steps}", f"{section}.log_every={max(1, steps // 8)}")
    rare = (f"{section}.validate_every=100000", f"{section}.validate_images=4", f"{section}.warmup_steps=0")
    arguments = options(command, preset, (*changes, *length, *rare, "prior.classes=0"), work)
    if command == "train-prior":
        arguments += ["--tokenizer", f"runs/{preset}"]
    expected, real = [], []
    for number in range(repeats):
        expected.append(json.loads(movq(work, *arguments, "-o", f"{section}.steps=2000", "--dry-run", "--json")[0]))
        run = work / "runs" / f"{name.replace(' ', '-')}-{number}"
        _, peak = movq(work, *arguments, "--run", str(run))
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
        real.append((expected[-1]["batch_size"] / statistics.median(rates[2:]), peak))
    seconds = statistics.median(plan["seconds_per_step"] for plan in expected)
    real_seconds = statistics.median(seconds for seconds, _ in real)
    gib = statistics.median(plan["peak_memory_gib"] for plan in expected)
    real_gib = statistics.median(peak for _, peak in real)
    result = {
        "name": name,
        "seconds_per_step": real_seconds,
        "expected_seconds_per_step": seconds,
        "time_ratio": seconds / real_seconds,
        "peak_gib": real_gib,
        "expected_peak_gib": gib,
        "memory_ratio": gib / real_gib,
    }
    print(json.dumps(result), flush=True)
    return result


def options(command: str, preset: str, changes: tuple[str, ...], work: Path) -> list[str]:
    """Return the arguments of a training."""
    settings = [part for change in changes for part in ("-o", change)]
    fixed = ["--preset", preset, "--data", "data", "--weights", str(work / "hub" / "checkpoints"), "--device", "cpu"]
    return [command, *fixed, *settings]


def movq(work: Path, *arguments: str) -> tuple[str, float]:
    """Run movq in a folder, and return its output and the peak of its memory in GiB."""
    with (work / "output").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "movq_cli", *arguments], cwd=work, stdout=output, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        messages = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"movq {' '.join(arguments)} failed: {messages}")
        return (work / "output").read_text(), usage.ru_maxrss / 2**20


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description="Expected and real time and memory of trainings.")
    parser.add_argument("source", help="images, as for `movq prepare`")
    parser.add_argument("--repeats", type=int, default=3, help="number of dry runs and real runs of each row")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of results")
    arguments = parser.parse_args()
    results = report(str(Path(arguments.source).resolve()), arguments.repeats)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "planning-cpu.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
