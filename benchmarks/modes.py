"""Measure how often each prior draws the requested digit, by decoding steps.

    make modes     after `make demo`: trains the other two priors on the digits of the demo, and prints the table

The weights are those of the best validation of each run, because the autoregressive priors see the digits unmasked and
memorize 4,500 of them before the run ends. The classifier is that of `benchmarks.digits`: 5 nearest neighbours on the
pixels of the training digits.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.digits import NEIGHBOURS, grey, pixels
from benchmarks.machine import machine
from movq_cli import Prior
from movq_cli.data import pixels as tensors
from movq_cli.data.shards import PreparedSet
from movq_cli.files import atomic_write
from movq_cli.runs import Run

STEPS = (1, 2, 4, 8, 12, 16)
BATCH = 100


def report(number: int) -> dict[str, Any]:
    """Measure every prior, and return the results.

    Args:
        number: Number of samples of each prior; a multiple of BATCH.
    """
    images = PreparedSet.open(Path("data/digits"))
    train = images.split("train")
    classifier = KNeighborsClassifier(NEIGHBOURS).fit(pixels(train), train.labels)
    requested = np.array([images.manifest.classes.index(name) for name in classes(number, images.manifest.classes)])
    rows = []
    for mode, folder in (("mask", "runs/digits-prior"), ("auto", "runs/digits-auto"), ("depth", "runs/digits-depth")):
        prior = Prior.load(Run(Path(folder), "prior").best)
        for steps in STEPS if mode == "mask" else (None,):
            start = time.perf_counter()
            samples = np.concatenate([draw(prior, steps, first) for first in range(0, number, BATCH)])
            seconds = time.perf_counter() - start
            accuracy = float((classifier.predict(samples) == requested).mean())
            passes = prior.transformer.length if steps is None else steps
            rows.append(
                {"mode": mode, "passes": passes, "class_accuracy": accuracy, "images_per_second": number / seconds}
            )
    return {"samples": number, "rows": rows, "machine": machine()}


def classes(number: int, names: tuple[str, ...]) -> list[str]:
    """Return the class of each sample; the sampler takes all classes in turn."""
    return [names[index % len(names)] for index in range(number)]


def draw(prior: Prior, steps: int | None, first: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return BATCH samples, the first with index `first`, as rows of grey values in [0, 1]."""
    images = tensors.to_bytes(prior.sample(BATCH, steps, indices=range(first, first + BATCH)))
    return np.stack([grey(image.permute(1, 2, 0).cpu().numpy()) for image in images])


def show(figures: dict[str, Any]) -> None:
    """Print the results as a table."""
    table = Table("prior", "decoding steps", "requested class", "images/s")
    for row in figures["rows"]:
        accuracy, rate = row["class_accuracy"], row["images_per_second"]
        table.add_row(row["mode"], str(row["passes"]), f"{accuracy:.1%}", f"{rate:.0f}")
    Console().print(table)


def main() -> None:
    """Draw samples, classify them, print the table and write the results."""
    parser = argparse.ArgumentParser(
        description="Measure the class accuracy of the priors of the demo, by decoding steps."
    )
    parser.add_argument("--samples", type=int, default=1000, help="samples of each prior")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    figures = report(arguments.samples)
    show(figures)
    atomic_write(arguments.out / "modes.json", (json.dumps(figures, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
