"""Measure the memory of whole commands at growing numbers of images: `prepare`, `sample` to a folder, and `evaluate`.

`benchmarks.growth` calls this module. Each command is a real `movq` process, on images of 8 pixels, so that no time is
spent on pixels. The memory of a process does not depend on what the pixels or the weights are, so both are random. In
`evaluate`, a projection of the pixels to 2,048 features takes the place of Inception (`benchmarks.projected`), whose
memory depends on the batch size and not on the number of images.

The memory of a command is the anonymous and the shared memory of its process and of all processes that it started: the
largest value over samples that are at least 10 ms apart. It is the sum of `Pss_Anon` and `Pss_Shmem` in
`/proc/PID/smaps_rollup`: a page that forked workers share is counted once, and neither program files nor memory-mapped
data files are counted, because the system can drop those pages at any time. The GPU's memory is not part of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.machine import machine
from movq_cli import presets
from movq_cli.checkpoints import PriorHeader, TokenizerHeader, save_weights
from movq_cli.data.images import encode_png
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.files import sha256
from movq_cli.models import priors
from movq_cli.models.tokenizer import Tokenizer

SIDE = 8
"""Side of the images in pixels."""

NUMBERS = (2_000, 6_000)
"""The numbers of images, ascending; the growth is the slope of the line that fits the memory best."""

FLAT = 256.0
"""Bytes an image below which the memory is called flat: 15 MB for 60,000 images."""

NOISE = 8 * 2**20
"""Bytes by which the memory of a command varies from run to run. Divided by the added images, this is the smallest
growth that the runs can show."""

_INTERVAL = 0.01  # shortest time between two samples, seconds
_SETTINGS = (
    f"vq.resolution={SIDE}",
    "vq.multipliers=[1, 1]",
    "vq.attention_resolutions=[4]",
    "vq.modulation.levels=2",
    "vq.embed_dim=16",
    "prior.layers=1",
    "prior.width=32",
    "prior.heads=2",
    "prior.hidden=64",
)


@dataclass(frozen=True)
class Usage:
    """The memory of one run of a command."""

    peak: int
    """Largest memory of its processes together, bytes, as the module describes it."""
    processes: int
    """Largest number of processes at one time."""
    seconds: float


def reports(device: torch.device, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Run every command at each number of images, and yield the results so far from the second number on.

    Args:
        device: Device of the networks.
        numbers: Two or more numbers of images, ascending.

    Raises:
        SystemExit: A command failed.
    """
    usages: dict[str, list[Usage]] = {}
    for index, number in enumerate(numbers, start=1):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            write_images(work / "pictures", number)
            write_weights(work)
            for name, arguments in commands(number, device):
                usage = run(arguments, work)
                print(f"{name}: {number} images, {usage.peak / 2**20:.0f} MiB, {usage.seconds:.0f} s", flush=True)
                usages.setdefault(name, []).append(usage)
        if index == 1:
            continue
        measured = numbers[:index]
        yield {
            "side": SIDE,
            "images": list(measured),
            "flat_bytes_per_image": FLAT,
            "smallest_visible_bytes_per_image": NOISE / (measured[-1] - measured[0]),
            "rows": [row(name, measured, found) for name, found in usages.items()],
            "machine": machine(device),
        }


def commands(number: int, device: torch.device) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the command line of each command, in their order: they read what earlier ones have made.

    Args:
        number: Number of images.
        device: Device of the networks.
    """
    movq, projected = ([sys.executable, "-m", name] for name in ("movq_cli", "benchmarks.projected"))
    prepare = ["prepare", "pictures", "--size", str(SIDE), "--val", "1", "--no-labels", "--workers", "2", "--quiet"]
    yield "prepare", [*movq, *prepare, "set"]
    yield "prepare --drop-duplicates", [*movq, *prepare, "distinct", "--drop-duplicates"]
    prior = ["--run", "prior.safetensors", "--tokenizer", "tokenizer.safetensors", "--device", str(device)]
    sample = [*movq, "sample", "samples", "--n", str(number), "--steps", "1", *prior, "--batch-size", "256", "--quiet"]
    yield "sample", sample
    yield "sample again, all images exist", sample
    sets = ["set", "samples", "--split", "train", "--weights", "weights", "--cache", "cache", "--device", str(device)]
    evaluate = [*projected, "evaluate", *sets, "--batch-size", "64", "--quiet"]
    yield "evaluate --fid, features computed", [*evaluate, "--fid"]
    for metric in ("fid", "kid", "prc", "is"):
        yield f"evaluate --{metric}, features cached", [*evaluate, f"--{metric}"]
    yield "evaluate --copies, features cached", [*evaluate, "--copies", "copies.png"]


def row(name: str, numbers: Sequence[int], usages: Sequence[Usage]) -> dict[str, Any]:
    """Return the row of a command: its memory, and the line that fits it best, as a constant and bytes an image."""
    peaks = [usage.peak for usage in usages]
    slope, constant = map(float, np.polyfit(numbers, peaks, 1))
    steps = list(zip(numbers, peaks, strict=True))
    slopes = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(steps)]
    noise = NOISE / (numbers[-1] - numbers[0])
    if slope < max(FLAT, noise):
        growth = "flat"
    else:
        growth = "linear" if slopes[-1] <= 1.25 * slopes[0] + noise else "faster"
    return {
        "command": name,
        "peak_bytes": peaks,
        "seconds": [usage.seconds for usage in usages],
        "processes": usages[-1].processes,
        "bytes_per_image": slope,
        "constant_bytes": constant,
        "growth": growth,
    }


# The inputs


def write_images(folder: Path, number: int) -> None:
    """Write PNG files of random pixels into a folder, all different."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(number):
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        (folder / f"{index:06d}.png").write_bytes(encode_png(Image.fromarray(pixels)))


def write_weights(folder: Path) -> None:
    """Write a tokenizer and a prior with random weights, and a stand-in for the file of Inception's weights."""
    torch.manual_seed(0)
    preset = presets.load("digits", list(_SETTINGS))
    tokenizer = folder / "tokenizer.safetensors"
    save_weights(tokenizer, Tokenizer(preset.vq), TokenizerHeader(vq=preset.vq))
    shape = preset.vq.code_shape
    header = PriorHeader(
        prior=preset.prior,
        shape=shape,
        sample=preset.sample,
        classes=tuple(map(str, range(preset.prior.classes))),
        tokenizer=sha256(tokenizer),
    )
    save_weights(folder / "prior.safetensors", priors.build(preset.prior, shape), header)
    (folder / "weights").mkdir()
    (folder / "weights" / WEIGHTS["inception"].file).write_bytes(b"the projection reads no weights")


# The memory


def run(arguments: Sequence[str], folder: Path) -> Usage:
    """Run a command, and return its memory.

    Args:
        arguments: Command line.
        folder: Working directory.

    Raises:
        SystemExit: The command failed.
    """
    start, peak, most = time.monotonic(), 0, 0
    with (folder / "output.txt").open("w+b") as output:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(folder / "home")}
        process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=output, stderr=output)
        while process.poll() is None:
            sampled = time.monotonic()
            family = descendants(process.pid)
            peak, most = max(peak, sum(map(memory, family))), max(most, len(family))
            # A process waits while its pages are counted, so this may take a tenth of its time at most.
            time.sleep(max(_INTERVAL, 9 * (time.monotonic() - sampled)))
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(arguments)} failed: {output.read().decode(errors='replace')}")
    return Usage(peak, most, time.monotonic() - start)


def descendants(process: int) -> list[int]:
    """Return the ids of a process and of all processes that it started; those that have ended are left out."""
    found = [process]
    for parent in found:  # the list grows while it is read
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def memory(process: int) -> int:
    """Return a process's share of its anonymous and shared memory, bytes; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    kilobytes = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    return 1024 * (kilobytes["Pss_Anon:"] + kilobytes["Pss_Shmem:"])


def why_not() -> str | None:
    """Return why the memory of processes cannot be measured on this machine, or None if it can."""
    own = Path("/proc/self")
    if memory(os.getpid()) and any(own.glob("task/*/children")):
        return None
    return "this system has no smaps_rollup or no children in /proc"


def show(figures: Mapping[str, Any]) -> None:
    """Print the results as a table."""
    table = Table(title=f"memory of commands by number of images ({figures['side']} pixels)")
    table.add_column("command", no_wrap=True)
    numbers = (f"MiB, {number:,} images" for number in figures["images"])
    for heading in (*numbers, "bytes an image", "MiB at 0 images", "growth"):
        table.add_column(heading, justify="right")
    for found in figures["rows"]:
        table.add_row(*cells(found))
    Console(width=measure.WIDTH).print(table)
    print(
        f"flat: below {figures['flat_bytes_per_image']:.0f} bytes an image, or below the "
        f"{figures['smallest_visible_bytes_per_image']:.0f} that these numbers of images can show"
    )


def cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row as text."""
    constant = found["constant_bytes"]
    return (
        found["command"],
        *(f"{peak / 2**20:.0f}" for peak in found["peak_bytes"]),
        f"{found['bytes_per_image']:.0f}",
        f"{constant / 2**20:.0f}",
        found["growth"],
    )
