"""What a network sees in a set of images: computed once for each set, by any number of ranks, and kept.

    CACHE/<extractor>-<key>/begun.json    what is being computed, written first
                            blocks/       the features so far (see `data.blocks`)
                            features.npy  float32 [N, D], a row an image; a corrupt one's is of zeros
                            sizes.npy     width and height of each image, 0 of a corrupt one
                            set.json      as begun.json, written last
                            statistics.npz  mean and covariance, once they have been asked for

The key is a hash of the images' bytes, of the crop, and of the network's weights: a set that has changed has another
one, whatever its folder is called.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from movq_cli.console import Console, Progress
from movq_cli.data.blocks import Arrays, Blocks
from movq_cli.errors import BadRequestError
from movq_cli.evaluation.distributions import FeatureStatistics
from movq_cli.evaluation.image_sets import ImageSet, Size
from movq_cli.files import atomic_path, atomic_write, locked
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.sources import stream

CACHE_LIMIT_BYTES = 20 * 2**30
"""Of features that are kept: beyond that the sets that were longest not asked for go."""

_BLOCK_IMAGES = 512
_FORMAT = 1
_HEADER, _BEGUN, _FEATURES, _SIZES, _STATISTICS = (
    "set.json",
    "begun.json",
    "features.npy",
    "sizes.npy",
    "statistics.npz",
)


class Extractor(Protocol):
    """A network with a name and the hash of its weights."""

    name: str
    width: int
    digest: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features [N, D] of uint8 images [N, 3, H, W]."""


class Reference(NamedTuple):
    """Statistics in place of real images, as guided-diffusion publishes them and `--stats` writes them."""

    path: Path
    mu: Tensor  # [D] float64
    sigma: Tensor  # [D, D]
    protocol: dict[str, Any]  # of the set that they are of; empty where the file does not say


@dataclass(frozen=True)
class Features:
    """The features of a set of N images, of which n can be read."""

    folder: Path
    places: NDArray[np.int64]  # [n], of those that can be read

    @cached_property
    def rows(self) -> Tensor:
        """[n, D] float32 on the CPU, memory-mapped unless images are missing."""
        table = np.load(self.folder / _FEATURES, mmap_mode="c")
        return torch.from_numpy(table if len(self.places) == len(table) else table[self.places])

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean [D] and sample covariance [D, D], float64 on the device; computed once and kept.

        Raises:
            BadRequestError: Fewer than two images.
        """
        kept = self.folder / _STATISTICS
        if not kept.is_file():
            # float64 is a GPU's business where that is CUDA; others have none.
            summed = FeatureStatistics(self.rows.shape[1], device if device.type == "cuda" else "cpu")
            for rows in self.rows.split(_BLOCK_IMAGES):
                summed.update(rows)
            write_reference(kept, summed.mean, summed.covariance, {})
        reference = read_reference(kept)
        where = device if device.type == "cuda" else torch.device("cpu")
        return reference.mu.to(where), reference.sigma.to(where)


def cached_features(
    images: ImageSet,
    network: Extractor,
    cache: Path,
    *,
    batch_size: int,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
    console: Console,
) -> Features:
    """A set's features, computed first where they are not kept yet; every rank must ask for them.

    Args:
        images: The set; the sizes of its images and which are corrupt become known to it.
        network: On the device.
        cache: Where features are kept.
        batch_size: Images at once.
        device: Where.
        ranks: Who shares the work.
        console: For the progress.

    Raises:
        BadRequestError: Another command is computing them.
        FailureError: They cannot be written, or an image of a strict set is corrupt.
    """
    content = ranks.from_first(lambda: images.content_hash)
    key = hashlib.sha256(f"{_FORMAT} {content} {network.name} {network.digest}".encode()).hexdigest()
    place = cache / f"{network.name}-{key[:16]}"
    header = {"format": _FORMAT, "images": len(images), "extractor": network.name, "key": key, "of": images.location}
    if not ranks.from_first((place / _HEADER).is_file):
        _make(place, header, images, network, batch_size, device, ranks, console)
        if ranks.is_first:
            _forget_oldest(cache, place)
    elif ranks.is_first:
        (place / _HEADER).touch()
    sizes = np.load(place / _SIZES)
    images.sizes |= {index: Size(*size) for index, size in enumerate(sizes.tolist()) if size[0]}
    # What is wrong with a corrupt image only the image tells.
    for _ in images.read(np.flatnonzero(sizes[:, 0] == 0).tolist()):
        pass
    return Features(place, np.flatnonzero(sizes[:, 0]))


def read_reference(path: Path) -> Reference:
    """Read the statistics of a network's features from an .npz that holds `mu` and `sigma`.

    Raises:
        BadRequestError: The file cannot be read, or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
            protocol = json.loads(str(file["protocol"])) if "protocol" in file else {}
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise BadRequestError(f"{path} holds no statistics ({error})", "It must hold `mu` and `sigma`.") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise BadRequestError(f"{path}: mu and sigma are of {list(mu.shape)} and {list(sigma.shape)} features")
    return Reference(path, mu, sigma, protocol)


def write_reference(path: Path, mu: Tensor, sigma: Tensor, protocol: dict[str, Any]) -> None:
    """Write statistics as guided-diffusion's tools read them, with the protocol of their set as JSON beside them."""
    mean, covariance = mu.cpu().numpy(), sigma.cpu().numpy()
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.savez(file, mu=mean, sigma=covariance, protocol=np.array(json.dumps(protocol)))


def _make(
    place: Path,
    header: dict[str, Any],
    images: ImageSet,
    network: Extractor,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
    console: Console,
) -> None:
    """Compute what an earlier command has not, all ranks together, and put the features in place."""
    blocks = Blocks(place / "blocks", len(images), _BLOCK_IMAGES)
    with ranks.long_barrier() as barrier, locked(place, "movq evaluate") if ranks.is_first else nullcontext():
        if ranks.is_first:
            atomic_write(place / _BEGUN, json.dumps(header, indent=1).encode())
        missing = ranks.from_first(blocks.missing)
        done = len(images) - sum(map(len, missing))
        with console.progress(len(images), f"features of {images.role}", "images", done) as progress:
            seen = partial(_seen, images, network, batch_size=batch_size, device=device, progress=progress)
            blocks.make(missing, seen, ranks, barrier, progress)
        if ranks.is_first:
            blocks.join("features", place / _FEATURES)
            blocks.join("sizes", place / _SIZES)
            atomic_write(place / _HEADER, json.dumps(header, indent=1).encode())
            blocks.clear()
            (place / _BEGUN).unlink()
        barrier()


def _seen(
    images: ImageSet,
    network: Extractor,
    blocks: list[range],
    *,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> Iterator[tuple[range, Arrays]]:
    """Blocks with the features and the sizes of their images; images of all blocks are decoded ahead."""
    stored = images.read(index for block in blocks for index in block)
    for block in blocks:
        found: list[tuple[Tensor, Tensor]] = []
        readable = ((place, image) for place, image in _next(stored, len(block)) if image is not None)
        for places, batch in stream.same_size_batches(readable, batch_size):
            pinned = batch.pin_memory() if device.type == "cuda" else batch
            moved = pinned.to(device, non_blocking=True)
            found.append((places, network(moved.contiguous(memory_format=torch.channels_last))))
            progress.advance(len(places))
        rows = torch.zeros(len(block), network.width)
        for places, features in found:  # the device is waited for once a block
            rows[places - block.start] = features.cpu()
        progress.advance(len(block) - sum(len(places) for places, _ in found))
        sizes = np.array([images.sizes.get(index, Size(0, 0)) for index in block], dtype=np.int32)
        yield block, {"features": rows.numpy(), "sizes": sizes}


def _next(items: Iterator[tuple[int, Tensor | None]], count: int) -> Iterator[tuple[int, Tensor | None]]:
    for _ in range(count):
        yield next(items)


def _forget_oldest(cache: Path, newest: Path) -> None:
    """Keep what is kept within its bounds."""
    whole = sorted(cache.glob(f"*/{_HEADER}"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for header in whole:
        total += sum(path.stat().st_size for path in header.parent.iterdir())
        if total > CACHE_LIMIT_BYTES and header.parent != newest:
            shutil.rmtree(header.parent, ignore_errors=True)
