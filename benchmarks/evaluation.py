"""Time FID and Inception Score of two folders, compared with the command line of torch-fidelity in the same run.

    python -m benchmarks.evaluation

Complete commands run in processes of their own, in turn: start, decoding, Inception, metrics. Both read the same PNG
files, which the benchmark draws, and the same file of random weights for Inception. The benchmark checks that the
metrics agree. The last row is `movq evaluate` again with cached features. The floor is the arithmetic of Inception at
the rate of one large matrix product; GiB is the peak memory of a process.
"""

from __future__ import annotations

import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks import measure
from benchmarks.machine import machine
from movq_cli import devices
from movq_cli.data.images import encode_png
from movq_cli.evaluation import extractors
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.files import atomic_write

SIDE = 256
AGREEMENT = 1e-3
"""Largest relative difference of the metrics that is rounding: float32 sums in another order."""


@dataclass
class Command:
    """A command line with the times and the peak memory of its runs."""

    name: str
    arguments: Sequence[str]
    seconds: list[float] = field(default_factory=list)
    memory: int = 0  # peak memory of its runs, bytes

    def run(self) -> dict[str, Any]:
        """Run the command once, and return the JSON object that it prints."""
        start = time.monotonic()
        process = subprocess.Popen(self.arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        self.seconds.append(time.monotonic() - start)
        self.memory = max(self.memory, used.ru_maxrss * 1024)
        if status:
            raise SystemExit(f"{self.name} failed: {' '.join(self.arguments)}")
        found: dict[str, Any] = json.loads(printed[printed.index(b"{") :])
        return found


def report(device: torch.device, count: int, repeats: int) -> dict[str, Any]:
    """Run the benchmark and return its results.

    Args:
        device: Device of Inception.
        count: Number of images in each folder.
        repeats: Number of timed runs of each command.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = [work / name / f"{number:06d}.png" for name in ("real", "fake") for number in range(count)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for path, picture in zip(files, threads.map(draw, range(len(files))), strict=True):
                atomic_write(path, picture)
        weights = draw_weights(work / "weights")
        floor = 2 * count * image_flops(work / "weights") / devices.matrix_rate(device, "float32")
        ours, theirs, again = commands(work, weights, device)
        differences: dict[str, float] = {}
        for number in range(repeats):
            ours.arguments = [*ours.arguments[:-1], str(work / f"cache{number}")]
            differences = check(ours.run(), theirs.run())
        again.arguments = ours.arguments
        for _ in range(repeats):
            again.run()
        return {
            "side": SIDE,
            "images": 2 * count,
            "peer": "torch-fidelity",
            "largest_differences": differences,
            "rows": [row(command, theirs, floor) for command in (ours, theirs, again)],
            "machine": machine(device),
        }


def commands(work: Path, weights: Path, device: torch.device) -> tuple[Command, Command, Command]:
    """Return the commands of movq, of the peer, and of movq with cached features.

    The last argument of movq's command is the folder of the feature cache.
    """
    real, fake = str(work / "real"), str(work / "fake")
    ours = [sys.executable, "-m", "movq_cli", "evaluate", "--fid", "--is", real, fake, "--json", "--quiet"]
    ours += ["--weights", str(weights.parent), "--device", str(device), "--batch-size", "64", "--cache", ""]
    theirs = [sys.executable, "-m", "torch_fidelity.fidelity", "--fid", "--isc", "--input1", fake, "--input2", real]
    theirs += ["--json", "--silent", "--feature-extractor-weights-path", str(weights)]
    theirs += ["--gpu", str(device.index or 0)] if device.type == "cuda" else ["--cpu"]
    return Command("movq evaluate", ours), Command("torch-fidelity", theirs), Command("movq evaluate, kept", [])


def check(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Return the relative differences of the metrics.

    Raises:
        SystemExit: A difference is larger than rounding.
    """
    pairs = {
        "fid": (ours["fid"], theirs["frechet_inception_distance"]),
        "isc": (ours["isc"], theirs["inception_score_mean"]),
    }
    differences = {name: abs(a - b) / abs(b) for name, (a, b) in pairs.items()}
    if max(differences.values()) > AGREEMENT or not all(map(math.isfinite, differences.values())):
        raise SystemExit(f"the metrics differ: {pairs}")
    return differences


def row(command: Command, peer: Command, floor: float) -> dict[str, Any]:
    """Return the row of a command; with cached features it has no floor and no peer, because Inception does not run."""
    seconds = statistics.median(command.seconds)
    anew = not command.name.endswith("kept")
    return {
        "name": command.name,
        "seconds": seconds,
        "runs": command.seconds,
        "peer_over_this": statistics.median(peer.seconds) / seconds if anew else None,
        "floor_seconds": floor if anew else None,
        "memory_bytes": command.memory,
    }


def draw(seed: int) -> bytes:
    """Return a PNG file of smooth colors with the grain of a photograph."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = draws.normal(0, 6, smooth.shape).round().astype(np.int16)
    return encode_png(Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)))


class _Drawn(FeatureExtractorInceptionV3):
    """The network with the weights of its constructor; no file is read."""

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load nothing."""


def draw_weights(folder: Path) -> Path:
    """Write random weights for Inception whose signals neither grow nor vanish; return the path."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = _Drawn("drawn", ["2048"], feature_extractor_weights_path=empty)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = folder / WEIGHTS["inception"].file
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path


def image_flops(weights: Path) -> int:
    """Return the operations of Inception for one image."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        extractors.load_inception(weights)(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    return int(counter.get_total_flops())


def main() -> None:
    """Run the benchmark, print its table and write its results."""
    parser = measure.parser("Time FID and IS of two folders, compared with torch-fidelity.", repeats=3)
    parser.add_argument("--images", type=int, help="images in each folder [default: 2,000 on CUDA, otherwise 150]")
    arguments = parser.parse_args()
    device = devices.select(arguments.device)
    count = arguments.images or (2000 if device.type == "cuda" else 150)
    figures = report(device, count, arguments.repeats)
    measure.show(f"FID and IS of {figures['images']} images of {SIDE} pixels", figures["rows"])
    print(f"relative differences of the metrics: {figures['largest_differences']}")
    measure.save(figures, arguments.out, "evaluation", device)


if __name__ == "__main__":
    main()
