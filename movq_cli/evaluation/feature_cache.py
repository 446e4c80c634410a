"""Feature cache: the features of a set of images are computed once, shared by all ranks, and stored on disk.

    CACHE/<extractor>-<key>/begun.json      what is being computed, written first
                            blocks/         the features so far (see `data.blocks`)
                            features.npy    float32 [N, D], a row for each image; zeros for a corrupt one
                            sizes.npy       width and height of each image, 0 for a corrupt one
                            set.json        as begun.json, written last
                            statistics.npz  mean and covariance, written when they are first used

The key is a hash of the bytes of the images, the crop, and the weights of the network. So a set that has changed has
another key, whatever its folder is called.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from movq_cli import agreement, digests
from movq_cli.console import Console, Progress, printable
from movq_cli.data.blocks import Arrays, Blocks, locked_in_turn
from movq_cli.digests import Header
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.evaluation.distributions import FeatureStatistics
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.files import atomic_file, is_writable
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.sources import stream

CACHE_LIMIT_BYTES = 20 * 2**30
"""Cache limit in bytes; the least recently used sets are evicted."""

HEADER = "set.json"
"""Name of the header of a complete set."""

_BLOCK_IMAGES = 512  # images in a block, which is written at once
_FORMAT: Literal[2] = 2
_IN_PROGRESS = "begun.json"
_FEATURES = "features.npy"
_SIZES = "sizes.npy"
_STATISTICS = "statistics.npz"


class FeatureCacheHeader(Header):
    """The content of `set.json`. The file is written last, so that a set that has it is complete."""

    format: Literal[2] = _FORMAT
    images: int
    """Number of images N."""
    extractor: str
    """Name of the feature extractor."""
    key: str
    """SHA-256 of the format, the bytes of the images, the crop, and the network with its weights."""
    of: str
    """Location of the set."""
    files: dict[str, str] = Field({})
    """Digest of each array file; empty while the computation is in progress."""


class Extractor(Protocol):
    """A network whose features can be cached."""

    name: str  # name of the features
    width: int  # number of features D
    digest: str  # hash of the weights

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features [N, D] of uint8 images [N, 3, H, W]."""


class Reference(NamedTuple):
    """Statistics in place of real images, in the format that guided-diffusion publishes and `--stats` writes."""

    path: Path
    mu: Tensor  # [D] float64
    sigma: Tensor  # [D, D] float64
    protocol: dict[str, Any]  # how they were made; empty if the file does not say

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and covariance on the device if it is CUDA, and on the CPU otherwise: others have no float64."""
        float64_device = _float64_device(device)
        return self.mu.to(float64_device), self.sigma.to(float64_device)


@dataclass(frozen=True)
class Features:
    """The stored features of a set of N images, of which n could be read."""

    folder: Path
    """Folder of the set in the cache."""
    indices: NDArray[np.int64]
    """Indices [n] of the images that could be read."""

    @cached_property
    def rows(self) -> Tensor:
        """Features [n, D] of these images, float32 on the CPU; memory-mapped unless an image could not be read."""
        table = np.load(self.folder / _FEATURES, mmap_mode="c")
        return torch.from_numpy(table if len(self.indices) == len(table) else table[self.indices])

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean [D] and sample covariance [D, D] in float64; they are computed once and stored.

        Args:
            device: Device for the computation and the result if it is CUDA; the CPU is used otherwise.

        Raises:
            BadRequestError: There are fewer than two images.
        """
        path = self.folder / _STATISTICS
        if not path.is_file():
            total = FeatureStatistics(self.rows.shape[1], _float64_device(device))
            for rows in self.rows.split(_BLOCK_IMAGES):
                total.update(rows)
            try:
                write_reference(path, total.mean, total.covariance, {})
            except FailureError:  # A cache that may only be read is read.
                return Reference(path, total.mean.cpu(), total.covariance.cpu(), {}).on(device)
        return read_reference(path).on(device)


def _float64_device(device: torch.device) -> torch.device:
    return device if device.type == "cuda" else torch.device("cpu")


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
    """Return the features of a set, computed first if they are not in the cache; every rank must call this.

    Args:
        images: The set; it also learns the sizes of its images and which are corrupt.
        network: Network that computes the features, on the device.
        cache: Folder of the cache.
        batch_size: Number of images in a batch.
        device: Device of the network.
        ranks: All processes of the command, which share the work.
        console: Console for progress.

    Raises:
        BadRequestError: A file of the cache is damaged.
        FailureError: The features cannot be written, or an image of a strict set is corrupt.
    """
    agreement.require_same(ranks, {f"the hash of the weights of {network.name}": network.digest})
    content = ranks.from_first(lambda: images.content_hash)
    key = hashlib.sha256(f"{_FORMAT} {content} {network.name} {network.digest}".encode()).hexdigest()
    folder = ranks.from_first(lambda: _writable_folder(cache, f"{network.name}-{key[:16]}", ranks, console))
    cache = folder.parent
    header = FeatureCacheHeader(images=len(images), extractor=network.name, key=key, of=printable(images.location))
    if not ranks.from_first(lambda: _is_complete(folder)):
        _compute(folder, header, images, network, batch_size, device, ranks, console)
        if ranks.is_first:
            _evict(cache, folder)
    sizes = np.load(folder / _SIZES)
    images.add_sizes(sizes)
    # The cache does not store what is wrong with a corrupt image, so these are read again.
    for _ in images.read(np.flatnonzero(sizes[:, 0] == 0).tolist()):
        pass
    return Features(folder, np.flatnonzero(sizes[:, 0]))


def _is_complete(folder: Path) -> bool:
    """Return whether all features are there, intact; a complete set counts as used now.

    Raises:
        BadRequestError: A file is damaged.
    """
    if not (folder / HEADER).is_file():
        return False
    check_features(folder)
    with suppress(OSError):  # A cache that may only be read is read.
        (folder / HEADER).touch()
    return True


def _writable_folder(cache: Path, name: str, ranks: Ranks, console: Console) -> Path:
    """Return the folder of a set, which is in a temporary cache if it is to be computed and cannot be written."""
    folder = cache / name
    if (folder / HEADER).is_file() or is_writable(folder) or not ranks.is_one_machine:
        return folder
    console.warn(
        f"the feature cache {cache} cannot be written, so that the features are computed again next time. To "
        "choose a folder to which you may write, set XDG_CACHE_HOME, or give `movq evaluate` the option --cache."
    )
    temporary = Path(tempfile.mkdtemp(prefix="movq-features-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary / name


def check_features(folder: Path) -> FeatureCacheHeader:
    """Compare the files of a complete feature cache with their digests, and return its header.

    Raises:
        BadRequestError: A file is damaged or missing, or the folder holds no complete feature cache.
    """
    remedy = f"Remove {folder}, and run the same command again: it computes the features anew."
    try:
        header = digests.read_header(folder / HEADER, FeatureCacheHeader, remedy)
    except (FileNotFoundError, NotADirectoryError):
        raise BadRequestError(f"{folder} holds no complete feature cache", remedy) from None
    digests.check_files(folder, (_FEATURES, _SIZES), header.files, remedy)
    if (folder / _STATISTICS).is_file():
        digests.check(folder / _STATISTICS, remedy)
    return header


def read_reference(path: Path) -> Reference:
    """Read the statistics of a network's features from an .npz file that holds `mu` and `sigma`.

    Raises:
        BadRequestError: The file is damaged, cannot be read, or does not hold such statistics.
    """
    digests.check(path, "Make it again with `movq evaluate --stats`.", required=False)
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
            protocol = json.loads(str(file["protocol"])) if "protocol" in file else {}
    except (OSError, KeyError, ValueError, TypeError, RecursionError, zipfile.BadZipFile) as error:
        raise BadRequestError(f"{path} holds no statistics ({error})", "It must hold `mu` and `sigma`.") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        shapes = f"{list(mu.shape)} and {list(sigma.shape)}"
        raise BadRequestError(f"{path}: mu and sigma have the shapes {shapes}, not [D] and [D, D]")
    return Reference(path, mu, sigma, protocol)


def write_reference(path: Path, mu: Tensor, sigma: Tensor, protocol: dict[str, Any]) -> None:
    """Write statistics in the format of guided-diffusion's tools, with a protocol as JSON in the same file.

    Args:
        path: The .npz file.
        mu: Mean [D].
        sigma: Covariance [D, D].
        protocol: How the statistics were made.

    Raises:
        FailureError: The file cannot be written.
    """
    mean, covariance = mu.cpu().numpy(), sigma.cpu().numpy()
    with atomic_file(path) as file:
        np.savez(file, mu=mean, sigma=covariance, protocol=np.array(json.dumps(protocol)))
        digests.append_to_zip(file)


def _compute(
    folder: Path,
    header: FeatureCacheHeader,
    images: ImageSet,
    network: Extractor,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
    console: Console,
) -> None:
    """Compute the blocks that an interrupted command has left out, on all ranks, and join all blocks to one table.

    If another command is computing them, it is waited for; nothing is left to do if it completes them.
    """
    blocks = Blocks(folder / "blocks", len(images), _BLOCK_IMAGES)
    with ranks.long_barrier() as barrier, locked_in_turn(folder, "movq evaluate", ranks, console):
        barrier()  # Without a timeout: rank 0 may have waited for hours.
        if ranks.from_first(lambda: _is_complete(folder)):
            return
        if ranks.is_first:
            digests.write_header(folder / _IN_PROGRESS, header)
        missing = ranks.from_first(blocks.missing)
        done = len(images) - sum(map(len, missing))
        with console.progress(len(images), f"features of {images.role}", "images", done) as progress:
            extract = partial(_extract, images, network, batch_size=batch_size, device=device, progress=progress)
            blocks.make(missing, extract, ranks, barrier, progress)
        if ranks.is_first:
            blocks.join("features", folder / _FEATURES)
            blocks.join("sizes", folder / _SIZES)
            files = digests.of_files(folder, (_FEATURES, _SIZES))
            digests.write_header(folder / HEADER, header.model_copy(update={"files": files}))
            blocks.clear()
            (folder / _IN_PROGRESS).unlink()
        barrier()


def _extract(
    images: ImageSet,
    network: Extractor,
    blocks: list[range],
    *,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> Iterator[tuple[range, Arrays]]:
    """Yield each block with the features and the sizes of its images; decoding runs ahead across blocks."""
    decoded = images.read(index for block in blocks for index in block)
    for block in blocks:
        extracted: list[tuple[Tensor, Tensor]] = []
        readable = ((index, image) for index, image in islice(decoded, len(block)) if image is not None)
        for indices, batch in stream.same_size_batches(readable, batch_size):
            pinned = batch.pin_memory() if device.type == "cuda" else batch
            moved = pinned.to(device, non_blocking=True)
            extracted.append((indices, network(moved.contiguous(memory_format=torch.channels_last))))
            progress.advance(len(indices))
        rows = torch.zeros(len(block), network.width)
        for indices, features in extracted:  # copied here, so that the host waits for the device once a block
            rows[indices - block.start] = features.cpu()
        progress.advance(len(block) - sum(len(indices) for indices, _ in extracted))
        yield block, {"features": rows.numpy(), "sizes": images.sizes[block.start : block.stop]}


def _evict(cache: Path, newest: Path) -> None:
    """Remove the least recently used sets beyond the cache limit, but never the newest."""
    complete = sorted(cache.glob(f"*/{HEADER}"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for header in complete:
        total += sum(path.stat().st_size for path in header.parent.iterdir())
        if total > CACHE_LIMIT_BYTES and header.parent != newest:
            shutil.rmtree(header.parent, ignore_errors=True)
