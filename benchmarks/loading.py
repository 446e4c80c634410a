"""Time the loading of training images, compared with ImageFolder of torchvision on the same images in the same run.

    python -m benchmarks.loading                    on images that the benchmark draws
    python -m benchmarks.loading --images FOLDER    on the central squares of these images

movq reads a prepared set as `movq train-vq` does: random crops, shuffled, [B, 3, 256, 256] uint8, decoded by as many
threads as the peer has worker processes. The peer is a plain data loader: ImageFolder on the same pixels as PNG or JPEG
files, RandomCrop, ToTensor, Normalize to [-1, 1], and a DataLoader that shuffles, with the same batch size. They take
turns; the results are medians with their range. Files come from the page cache on both sides. The floor is the number
of bytes over the rate of one large copy: the stored file is read once, and the pixels are written once. The share is
the part of a training step, on the device, that is spent waiting for the next batch.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks import measure
from benchmarks.machine import machine
from benchmarks.sampling import copy_rate
from benchmarks.training import draw_lpips
from movq_cli import console, devices, presets
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.data import loader, png
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.shards import PreparedSet, Split
from movq_cli.image_size import ImageSize, Resolution
from movq_cli.settings import DataSettings
from movq_cli.training.vq import TokenizerTraining

SIDE = 256
WORKERS = (0, 2)
CLASSES = 4
CPU = torch.device("cpu")
_TOLD = {"size", "square", "filter", "compression", "counts"}
FILES: dict[str, dict[str, Any]] = {"png": {}, "jpeg": {"quality": 95}}
"""Suffixes of the files of the peer, and the options with which Pillow writes them."""


@dataclass
class Contender:
    """An endless stream of batches, and the rates that were measured."""

    name: str
    workers: int
    stored: float  # mean bytes of the file of an image
    stream: Iterator[Any]
    rates: list[float] = field(default_factory=list)  # images per second


def report(
    pictures: str | None, count: int, batch_size: int, repeats: int, preset: str, device: torch.device
) -> dict[str, Any]:
    """Run the benchmark and return its results.

    Args:
        pictures: Source of images; None draws them.
        count: Number of images to draw.
        batch_size: Number of images per batch.
        repeats: Number of turns of each contender.
        preset: Name of the preset whose training step is compared with the loading.
        device: Device of that step; the loading alone is timed on the CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sets = make_sets(work, pictures, count)
        contenders = contest(work, sets, batch_size)
        race(contenders, batch_size, repeats)
        bandwidth = copy_rate(CPU)
        peers = {contender.workers: contender for contender in contenders if contender.name == "ImageFolder, png"}
        rows = [row(contender, peers[contender.workers], bandwidth) for contender in contenders]
        split = sets["zlib"].split("train")
        return {
            "side": SIDE,
            "images": len(split),
            "batch_size": batch_size,
            "pictures": "drawn" if pictures is None else pictures,
            "peer": "torchvision's ImageFolder",
            "prepared": {name: prepared.manifest.model_dump(include=_TOLD) for name, prepared in sets.items()},
            "copy_bytes_per_second": bandwidth,
            "rows": rows,
            "stage_seconds": {name: our_stages(prepared.split("train"), batch_size) for name, prepared in sets.items()}
            | {f"ImageFolder, {suffix}": its_stages(work / suffix, batch_size) for suffix in FILES},
            "step": step_share(work, sets["zlib"], preset, device, repeats),
            "machine": machine(device),
        }


# The images


def make_sets(work: Path, pictures: str | None, count: int) -> dict[str, PreparedSet]:
    """Write prepared sets with each compression, and the same images in class folders for the peer; return the sets."""
    if pictures is None:
        pictures = str(work / "drawn")
        for number in range(count):
            path = work / "drawn" / f"{number:05d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(draw(number)).save(path, compress_level=1)
    sets = {name: prepared(pictures, work / name, SIDE, name) for name in get_args(png.Compression)}
    split = sets["none"].split("train")
    for suffix, options in FILES.items():
        for index in range(len(split)):
            path = work / suffix / f"class {index % CLASSES}" / f"{index:06d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.pixels(index)).save(path, **options)
    return sets


def draw(seed: int) -> NDArray[np.uint8]:
    """Return smooth colors with fine texture, [SIDE, SIDE, 3]; as a PNG about 110 kB, the size of a photograph."""
    rng = np.random.default_rng(seed)
    coarse, fine = (
        np.asarray(Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).resize((SIDE, SIDE)), np.float32)
        for shape in ((8, 8, 3), (SIDE // 2, SIDE // 2))
    )
    strength = rng.uniform(0.02, 0.25)
    texture = strength * (fine - 128)[..., None] + rng.normal(0, 2.0, (SIDE, SIDE, 3))
    return np.clip(coarse + texture, 0, 255).astype(np.uint8)


def prepared(pictures: str, out: Path, resolution: Resolution, compression: png.Compression) -> PreparedSet:
    """Prepare the central squares or rectangles of images as a set."""
    is_square = ImageSize.of(resolution).is_square
    preprocessing = Preprocessing(size=resolution, square=is_square, upscale=True, compression=compression)
    request = PrepareRequest(pictures, out, preprocessing, val="1", keep_labels=False)
    prepare(request, console.Console(quiet=True, mute=True))
    return PreparedSet.open(out)


# The race


def contest(work: Path, sets: dict[str, PreparedSet], batch_size: int) -> list[Contender]:
    """Return the contenders of movq and of the peer for each number of workers."""
    contenders = []
    for workers in WORKERS:
        for name, prepared_set in sets.items():
            split = prepared_set.split("train")
            contenders.append(Contender(f"movq, {name}", workers, stored(split), ours(split, batch_size, workers)))
        for suffix in FILES:
            files = [path.stat().st_size for path in (work / suffix).rglob("*.*")]
            stream = iter(its_loader(work / suffix, batch_size, workers))
            contenders.append(Contender(f"ImageFolder, {suffix}", workers, statistics.mean(files), stream))
    return contenders


def ours(split: Split, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Return the stream of batches that `movq train-vq` reads."""
    order = EpochOrder(len(split), batch_size, seed=0)
    data = DataSettings(crop="random", workers=workers)
    return loader.training_batches(split, order, data, resolution=SIDE, seed=0, start=0, device=CPU)


def its_loader(folder: Path, batch_size: int, workers: int) -> DataLoader[Any]:
    """Return the data loader of the peer, practically endless."""
    steps = [transforms.RandomCrop(SIDE), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    images = ImageFolder(folder, transforms.Compose(steps))
    shuffled = RandomSampler(images, num_samples=10**6 * batch_size)
    return DataLoader(images, batch_size, sampler=shuffled, num_workers=workers)


def stored(split: Split) -> float:
    """Return the mean bytes of the file of an image."""
    return float(split.extents[:, 2].mean())


def race(contenders: list[Contender], batch_size: int, repeats: int) -> None:
    """Let all contenders load in turn, about 300 images at a time."""
    batches = -(-300 // batch_size)
    for _ in range(repeats):
        for contender in contenders:
            # Discard the batches that were prefetched during the turns of the others, and one more.
            for _ in range(2 * contender.workers + 1):
                next(contender.stream)
            start = time.perf_counter()
            for _ in range(batches):
                next(contender.stream)
            seconds = time.perf_counter() - start
            contender.rates.append(batches * batch_size / seconds)
            # Wait until its prefetching is done, because it would slow down the next contender.
            time.sleep(2 * contender.workers * seconds / batches)


def row(contender: Contender, peer: Contender, bandwidth: float) -> dict[str, Any]:
    """Return the row of a contender."""
    rate, ours = statistics.median(contender.rates), contender.name.startswith("movq")
    return {
        "name": f"{contender.name}, {contender.workers} workers",
        "workers": contender.workers,
        "bytes": contender.stored,
        "images_per_second": rate,
        "rates": contender.rates,
        "seconds": 1 / rate,
        "peer_over_this": rate / statistics.median(peer.rates) if ours or contender is peer else None,
        "floor_seconds": (contender.stored + 3 * SIDE**2) / bandwidth if ours else None,
    }


# Where the time goes


def our_stages(split: Split, batch_size: int) -> dict[str, float]:
    """Return the seconds per image of each stage of movq, in one thread."""
    chosen = range(min(len(split), 200))
    files = [split.read(index) for index in chosen]
    images = [split.pixels(index) for index in chosen]
    batch = np.empty((batch_size, 3, SIDE, SIDE), np.uint8)

    def stack(index: int) -> None:
        batch[index % batch_size] = images[index].transpose(2, 0, 1)

    return {
        "read": each(split.read, chosen),
        "decode": each(lambda index: png.decode(files[index]), chosen),
        "stack": each(stack, chosen),
    }


def its_stages(folder: Path, batch_size: int) -> dict[str, float]:
    """Return the seconds per image of each stage of the peer; `transport` is the transfer from a worker process."""
    files = sorted(folder.rglob("*.*"))[:200]
    chosen = range(len(files))
    images = [Image.open(file).convert("RGB") for file in files]
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    tensors = [convert(image) for image in images[:batch_size]]
    return {
        "read and decode": each(lambda index: Image.open(files[index]).convert("RGB"), chosen),
        "convert": each(lambda index: convert(images[index]), chosen),
        "stack": each(lambda _: torch.stack(tensors), range(5)) / len(tensors),
        "transport": transport(torch.stack(tensors)),
    }


def each(work: Callable[[int], object], chosen: range) -> float:
    """Return the seconds of the work per index, the best of three rounds."""
    return min(devices.seconds(lambda: [work(index) for index in chosen], CPU) for _ in range(3)) / len(chosen)


class Same(Dataset[Tensor]):
    """One batch, copied at each access as a data loader writes each batch anew."""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Tensor:
        return self.batch.clone()


def transport(batch: Tensor) -> float:
    """Return the seconds per image of the transfer of a batch from a worker process, including its copy."""
    stream = iter(DataLoader(Same(batch), batch_size=None, num_workers=1))
    for _ in range(10):
        next(stream)
    return devices.seconds(lambda: [next(stream) for _ in range(40)], CPU) / 40 / len(batch)


def step_share(work: Path, images: PreparedSet, name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time the training step of a preset, and the part of it that waits for the batch."""
    preset = presets.load(name)
    if preset.vq.resolution != SIDE:
        images = prepared(str(images.root), work / "small", preset.vq.resolution, "zlib")
    draw_lpips(work)
    batch_size = min(preset.train_vq.batch_size, images.manifest.counts["train"])
    preset = presets.load(name, [f"train_vq.batch_size={batch_size}", "train_vq.discriminator_start=0"])
    training = TokenizerTraining(preset, images, device, work / "hub" / "checkpoints")
    stream = training.batches(0)
    waits, steps = [], []
    for step in range(repeats + 2):
        start = time.perf_counter()
        batch = next(stream)
        waits.append(time.perf_counter() - start)
        steps.append(waits[-1] + devices.seconds(lambda batch=batch, step=step: training.step(batch, step), device))  # type: ignore[misc]
    wait, whole = statistics.median(waits[2:]), statistics.median(steps[2:])
    return {
        "preset": name,
        "batch_size": batch_size,
        "workers": loader.worker_count(preset.data.workers, device, training.ranks),
        "seconds": whole,
        "loading_seconds": wait,
        "loading_share": wait / whole,
    }


# The report


def show(figures: dict[str, Any]) -> None:
    """Print the results as tables."""
    table = Table(title=f"loading {figures['images']} images of {SIDE} x {SIDE}, {figures['batch_size']} at once")
    table.add_column("loader", no_wrap=True)
    for heading in ("kB", "img/s", "from", "to", "ratio", "floor"):
        table.add_column(heading, justify="right")
    for found in figures["rows"]:
        table.add_row(
            found["name"],
            f"{found['bytes'] / 1000:.0f}",
            f"{found['images_per_second']:.0f}",
            f"{min(found['rates']):.0f}",
            f"{max(found['rates']):.0f}",
            measure.cells(found)[1],
            measure.cells(found)[3],
        )
    Console(width=measure.WIDTH).print(table)
    print("ratio: to the rate of ImageFolder on PNG files with as many workers; floor: share of the limit")
    for name, stages in figures["stage_seconds"].items():
        print(f"{name}: " + ", ".join(f"{stage} {seconds * 1e6:.0f} us" for stage, seconds in stages.items()))
    step = figures["step"]
    print(
        f"a step of {step['preset']}, {step['batch_size']} images: {step['seconds']:.3g} s, of which "
        f"{step['loading_seconds']:.3g} s ({step['loading_share']:.1%}) are spent waiting for the loader"
    )


def main() -> None:
    """Run the benchmark, print its tables and write its results."""
    parser = measure.parser("Measure images per second of the training loader.", repeats=7)
    parser.add_argument("--images", help="folder, archive or prepared set [default: images are drawn]")
    parser.add_argument("--count", type=int, default=1000, help="number of images to draw")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch")
    parser.add_argument("--preset", help="preset of the training step [default: ffhq on CUDA, otherwise digits]")
    arguments = parser.parse_args()
    device = devices.select(arguments.device)
    preset = arguments.preset or ("ffhq" if device.type == "cuda" else "digits")
    figures = report(arguments.images, arguments.count, arguments.batch_size, arguments.repeats, preset, device)
    show(figures)
    measure.save(figures, arguments.out, "loading", device)


if __name__ == "__main__":
    main()
