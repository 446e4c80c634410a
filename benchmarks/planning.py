"""Compare the expected time and memory of trainings with those of real ones.

    python -m benchmarks.planning SOURCE      SOURCE is anything that `movq prepare` reads, at least 32 pixels a side

Each row is a preset with changes. The expected time of a step is that of `training.pace`. The real one is the
difference between two runs of `movq` of different lengths, divided by the difference of their numbers of steps. Both
are processor time of one thread, so that other work on the machine matters little. The expected peak of the memory is
that of a dry run, and the real one is what the system reports for the process of the longer run. Random weights stand
in for those of VGG-16, which cost the same; so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.machine import machine
from benchmarks.training import draw_lpips
from movq_cli import devices, presets
from movq_cli.commands import outlook
from movq_cli.run_manifest import Kind
from movq_cli.training import fit

ROWS: dict[str, tuple[str, str, tuple[str, ...], int]] = {
    "digits, stage 1": ("train-vq", "digits", (), 60),
    "digits, stage 1, batch 256": ("train-vq", "digits", ("train_vq.batch_size=256",), 20),
    "photos-32, stage 1, before the discriminator": ("train-vq", "photos-32", ("train_vq.adversarial_weight=0",), 60),
    "photos-32, stage 1, with the discriminator": ("train-vq", "photos-32", ("train_vq.discriminator_start=0",), 60),
    "photos-32, stage 1, batch 64 in float32": (
        "train-vq",
        "photos-32",
        ("train_vq.batch_size=64", "train_vq.precision=float32", "train_vq.discriminator_start=0"),
        20,
    ),
    "photos-32, stage 2": ("train-prior", "photos-32", (), 60),
    "photos-32, stage 2, batch 512": ("train-prior", "photos-32", ("train_prior.batch_size=512",), 20),
}
"""Command, preset, changed settings and number of real steps of each row, by its name."""


def report(source: str) -> dict[str, Any]:
    """Run the benchmark on the images of a source and return its results."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        draw_lpips(work)
        run("movq_cli", work, "prepare", source, "data", "--size", "32", "--no-labels")
        for preset in sorted({preset for command, preset, *_ in ROWS.values() if command == "train-prior"}):
            changes = ("train_vq.perceptual_weight=0", "train_vq.adversarial_weight=0")
            arguments = options("train-vq", preset, (*changes, "train_vq.steps=1", "train_vq.validate_images=4"), work)
            run("movq_cli", work, *arguments, "--run", f"runs/{preset}")
        rows = [row(name, work) for name in ROWS]
    return {"rows": rows, "machine": machine(torch.device("cpu"))}


def row(name: str, work: Path) -> dict[str, Any]:
    """Return the expected and the real time and memory of a row."""
    steps = ROWS[name][3]
    expected = json.loads(run("benchmarks.planning", work, "--expected", name).output)
    runs = []
    for number in (steps // 4, steps):
        arguments = (*training(name, number, work), "--run", f"runs/{name.replace(' ', '-')}-{number}")
        runs.append(run("movq_cli", work, *arguments))
    seconds = (runs[1].seconds - runs[0].seconds) / (steps - steps // 4)
    peak = runs[1].peak_gib
    result = {
        "name": name,
        "seconds_per_step": seconds,
        "expected_seconds_per_step": expected["seconds_per_step"],
        "time_ratio": expected["seconds_per_step"] / seconds,
        "peak_gib": peak,
        "expected_peak_gib": expected["peak_gib"],
        "memory_ratio": expected["peak_gib"] / peak,
    }
    print(json.dumps(result), flush=True)
    return result


def training(name: str, steps: int, work: Path) -> list[str]:
    """Return the arguments of the training of a row with a number of steps."""
    command, preset, changes, _ = ROWS[name]
    section = command.replace("-", "_")
    rare = (f"{section}.epochs=null", f"{section}.steps={steps}", f"{section}.validate_images=4")
    arguments = options(command, preset, (*changes, *rare), work)
    return (
        [*arguments, "--tokenizer", f"runs/{preset}", "-o", "prior.classes=0"]
        if section == "train_prior"
        else arguments
    )


def expect(name: str) -> dict[str, float]:
    """Return the expected time of a step, in processor time, and the expected peak of the memory of a row."""
    command, preset, changes, _ = ROWS[name]
    kind: Kind = "vq" if command == "train-vq" else "prior"
    torch.set_num_threads(1)
    device = devices.select("cpu")
    settings = presets.load(preset, [*changes, "prior.classes=0"])
    peak = fit.fit(outlook.cost_of(settings, kind, device), device, 1).peak
    devices.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment, attr-defined]
    pace = outlook.measure(settings, kind, device, validation_images=4, weights=Path("hub/checkpoints"))
    return {"seconds_per_step": pace.adversarial_step, "peak_gib": peak}


def options(command: str, preset: str, changes: tuple[str, ...], work: Path) -> list[str]:
    """Return the arguments of a training."""
    settings = [part for change in changes for part in ("-o", change)]
    fixed = ["--preset", preset, "--data", "data", "--weights", str(work / "hub" / "checkpoints"), "--device", "cpu"]
    return [command, *fixed, *settings]


class Run(NamedTuple):
    """A finished process."""

    output: str
    seconds: float
    """Processor time."""
    peak_gib: float
    """Largest memory that the process held."""


def run(module: str, work: Path, *arguments: str) -> Run:
    """Run a Python module with one thread in a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (work / "output").open("w+") as output, (work / "messages").open("w+") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=work, stdout=output, stderr=messages, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{module} {' '.join(arguments)} failed: {(work / 'messages').read_text()}")
    return Run((work / "output").read_text(), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description="Expected and real time and memory of trainings.")
    parser.add_argument("source", nargs="?", help="images, as for `movq prepare`")
    parser.add_argument("--expected", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of results")
    arguments = parser.parse_args()
    if arguments.expected:
        print(json.dumps(expect(arguments.expected)))
        return
    if arguments.source is None:
        parser.error("SOURCE is missing")
    results = report(str(Path(arguments.source).resolve()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "planning-cpu.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
