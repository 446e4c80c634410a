"""Report on the demo: whether the samples are the requested digits, and whether they are new.

    python -m benchmarks.digits demo          measure what `make demo` made in demo/, and write demo/report.json
    python -m benchmarks.digits --show demo   print that report

A 5-nearest-neighbour classifier on the pixels of the training digits determines the classes of the samples; the same
classifier on real held-out digits gives the value to compare with. How new the samples are follows from their distance
to the nearest training digit, compared with that of held-out digits (as they are, and reconstructed, because the
tokenizer smooths what it decodes) and with that of copies: training digits that were encoded and decoded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.machine import machine
from movq_cli import Tokenizer
from movq_cli.data import pixels as tensors
from movq_cli.data.shards import PreparedSet, Split
from movq_cli.data.spacing import evenly_spaced
from movq_cli.files import atomic_write

NEIGHBOURS = 5
COPIES = 500
Pixels = NDArray[np.float32]
"""Grey values in [0, 1], an image a row, [N, 32 x 32]."""


def report(demo: Path) -> dict[str, Any]:
    """Measure the demo, and return the results.

    Args:
        demo: Folder that `make demo` fills.
    """
    train_vq, train_prior, evaluate, sample = (
        json.loads((demo / f"{name}.json").read_text()) for name in ("train-vq", "train-prior", "evaluate", "sample")
    )
    images = PreparedSet.open(Path("data/digits"))
    train, held_out = images.split("train"), images.split("val")
    assert train.labels is not None and held_out.labels is not None
    classifier = KNeighborsClassifier(NEIGHBOURS).fit(pixels(train), train.labels)
    manifest = json.loads((demo / "samples" / "manifest.json").read_text())
    samples = read(demo / "samples" / image["file"] for image in manifest["images"])
    requested = np.array([images.manifest.classes.index(image["class"]) for image in manifest["images"]])
    rebuilt = read(sorted((demo / "reconstructions").rglob("*.png")))
    return {
        "reconstruction": {
            "images": evaluate["protocol"]["pairs"]["matched"],
            "psnr": evaluate["psnr"],
            "ssim": evaluate["ssim"],
            "codebook_usage": train_vq["usage"],
            "codebook_perplexity": train_vq["perplexity"],
        },
        "prior": {"loss": train_prior["loss"], "unigram_entropy": train_prior["unigram_entropy"]},
        "samples": {
            "images": sample["images"],
            "steps": manifest["settings"]["steps"],
            "guidance": manifest["settings"]["guidance"],
            "class_accuracy": float((classifier.predict(samples) == requested).mean()),
            "held_out_class_accuracy": float((classifier.predict(pixels(held_out)) == held_out.labels).mean()),
            "median_distance": nearest(classifier, samples),
            "held_out_median_distance": nearest(classifier, pixels(held_out)),
            "reconstructed_median_distance": nearest(classifier, rebuilt),
            "copied_median_distance": nearest(classifier, copies(train)),
        },
        "machine": machine(),
        "pictures": [str(demo / "reconstructions.png"), str(demo / "samples.png")],
    }


def pixels(split: Split) -> Pixels:
    """Return every image of a split as rows of grey values."""
    return np.stack([grey(split.pixels(index)) for index in range(len(split))])


def read(files: Iterable[Path]) -> Pixels:
    """Return the pictures of some files as rows of grey values."""
    return np.stack([grey(np.asarray(Image.open(file))) for file in files])


def copies(train: Split) -> Pixels:
    """Return what copies would look like: evenly spaced training digits, encoded and decoded."""
    chosen = evenly_spaced(len(train), COPIES)
    originals = torch.stack([tensors.from_array(train.pixels(index)) for index in chosen])
    tokenizer = Tokenizer.load("runs/digits-vq")
    rebuilt = tensors.to_bytes(tokenizer.decode(tokenizer.encode(tensors.to_signed(originals))))
    return np.stack([grey(image.permute(1, 2, 0).numpy()) for image in rebuilt])


def grey(image: NDArray[np.uint8]) -> Pixels:
    """Convert an RGB image [H, W, 3] to a row of grey values in [0, 1]."""
    return (image.astype(np.float32).mean(-1) / 255).ravel()


def nearest(classifier: KNeighborsClassifier, images: Pixels) -> float:
    """Return the median over the images of the Euclidean distance to the nearest training digit."""
    distances, _ = classifier.kneighbors(images, n_neighbors=1)
    return float(np.median(distances))


def show(figures: dict[str, Any]) -> None:
    """Print the results as a table."""
    rebuilt, prior, samples = figures["reconstruction"], figures["prior"], figures["samples"]
    table = Table("metric", "measured", "for comparison")
    held_out = f"{rebuilt['images']} held-out digits"
    table.add_row("reconstruction PSNR", f"{rebuilt['psnr']:.2f} dB", held_out)
    table.add_row("reconstruction SSIM", f"{rebuilt['ssim']:.4f}", held_out)
    table.add_row("codebook entries used", f"{rebuilt['codebook_usage']:.1%}", held_out)
    table.add_row(
        "loss of the prior, nats per code",
        f"{prior['loss']:.3f}",
        f"entropy of the codes {prior['unigram_entropy']:.3f}",
    )
    table.add_row(
        "samples of the requested class",
        f"{samples['class_accuracy']:.1%}",
        f"held-out digits {samples['held_out_class_accuracy']:.1%}",
    )
    table.add_row(
        "distance to nearest digit",
        f"{samples['median_distance']:.2f}",
        f"held-out {samples['held_out_median_distance']:.2f}, a copy {samples['copied_median_distance']:.2f}",
    )
    Console().print(table)
    print("\n".join(figures["pictures"]))


def main() -> None:
    """Measure the demo, or print its report."""
    parser = argparse.ArgumentParser(description="Measure what `make demo` made.")
    parser.add_argument("demo", type=Path, help="folder of the demo")
    parser.add_argument("--show", action="store_true", help="print the existing report")
    arguments = parser.parse_args()
    path = arguments.demo / "report.json"
    if arguments.show:
        show(json.loads(path.read_text()))
    else:
        atomic_write(path, (json.dumps(report(arguments.demo), indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
