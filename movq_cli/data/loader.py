"""Batches of a prepared set: decoded ahead in threads, and uint8 until they are on the device.

The workers are threads and not processes, because the slow operations (reading, zlib, copies) run outside the
interpreter's lock, and because a batch is written only once, into memory that the device copies from. Between processes
a batch would pass through shared memory, which takes longer than decoding an uncompressed set and is limited to 64 MiB
in a container; and a process can be killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from movq_cli.cores import allowed_cores
from movq_cli.data import views
from movq_cli.data.prefetch import map_ahead
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.shards import PreparedSet, Split
from movq_cli.errors import BadRequestError
from movq_cli.image_size import ImageSize, Resolution
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.settings import DataSettings, TokenizerSettings, ViewSettings

CropKey = tuple[int, int]
"""Epoch and index of an image: together with the seed they decide the crop."""

_Key = TypeVar("_Key")
_AHEAD = 2
"""Number of batches per thread that are prepared ahead."""


class Crops:
    """Crops of a split; each is a pure function of the seed, the epoch and the image.

    Args:
        split: Split of a prepared set.
        resolution: Size of the crops.
        random: Whether the position of a crop is random; otherwise it is the centre.
        flip: Whether each crop is mirrored with probability one half.
        seed: Seed of the random positions and flips.
    """

    def __init__(self, split: Split, resolution: Resolution, *, random: bool, flip: bool, seed: int) -> None:
        self.split = split
        self.size = ImageSize.of(resolution)
        self.random = random
        self.flip = flip
        self.seed = seed

    def batch(self, keys: Sequence[CropKey], *, pinned: bool = False) -> Tensor:
        """Return a batch of crops.

        Args:
            keys: Epoch and image of each crop.
            pinned: Whether the batch lies in pinned memory, from which a GPU copies asynchronously.

        Returns:
            [B, 3, H, W] uint8.
        """
        batch = torch.empty(len(keys), 3, *self.size, dtype=torch.uint8, pin_memory=pinned)
        # numpy copies the transposed pixels, here and in `Views`: torch's copy takes four times as long.
        for row, key in zip(batch.numpy(), keys, strict=True):
            row[...] = self._crop(*key).transpose(2, 0, 1)
        return batch

    def _crop(self, epoch: int, index: int) -> NDArray[np.uint8]:
        image = self.split.pixels(index)
        spare = np.subtract(image.shape[:2], self.size)
        top, left = spare // 2
        mirrored = False
        if self.flip or (self.random and spare.any()):
            rng = np.random.default_rng((self.seed, epoch, index))
            if self.random:
                top, left = rng.integers(0, spare + 1)
            mirrored = self.flip and rng.random() < 0.5
        crop = image[top : top + self.size.height, left : left + self.size.width]
        return crop[:, ::-1] if mirrored else crop


class Views:
    """All views of each image of a split; an image is decoded once for all its views.

    Args:
        split: Split of a prepared set.
        resolution: Size of the views.
        settings: Settings of the views.
    """

    def __init__(self, split: Split, resolution: Resolution, settings: ViewSettings) -> None:
        self.split = split
        self.size = ImageSize.of(resolution)
        self.settings = settings

    def batch(self, indices: Sequence[int], *, pinned: bool = False) -> Tensor:
        """Return all views of some images.

        Args:
            indices: Indices of the images.
            pinned: Whether the batch lies in pinned memory, from which a GPU copies asynchronously.

        Returns:
            [B x V, 3, H, W] uint8; the V views of an image are consecutive.
        """
        shape = (len(indices), self.settings.count, 3, *self.size)
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        for rows, index in zip(batch.numpy(), indices, strict=True):
            rows[...] = views.of_image(self.split.pixels(index), self.size, self.settings)
        return batch.flatten(0, 1)


def training_batches(
    split: Split,
    order: EpochOrder,
    data: DataSettings,
    *,
    resolution: Resolution,
    seed: int,
    start: int,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Tensor]:
    """Yield a rank's share of the training batches, without end.

    Args:
        split: Training split.
        order: Order of the images, which decides those of each step.
        data: Settings of the crops and the workers.
        resolution: Size of the crops.
        seed: Seed of the random crops.
        start: Step of the first batch; above 0 in a resumed run.
        device: Device of the batches.
        ranks: Ranks that share each batch.

    Yields:
        [B, 3, H, W] uint8 on the device.
    """
    crops = Crops(split, resolution, random=data.crop == "random", flip=data.flip, seed=seed)
    return _batches(crops.batch, _steps(order, start, ranks), worker_count(data.workers, device, ranks), device)


def validation_batches(
    split: Split,
    indices: Sequence[int],
    data: DataSettings,
    *,
    resolution: Resolution,
    batch_size: int,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Tensor]:
    """Yield the centre crops of a rank's share of images once, in order.

    Args:
        split: The split.
        indices: Images of the split.
        data: Settings of the workers.
        resolution: Size of the crops.
        batch_size: Number of images in a batch.
        device: Device of the batches.
        ranks: Ranks that share the split.

    Yields:
        [B, 3, H, W] uint8 on the device.
    """
    keys = [(0, index) for index in indices[ranks.share(len(indices))]]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return _batches(_center_crops(split, resolution).batch, batches, worker_count(data.workers, device, ranks), device)


def view_batches(
    images: Views,
    batches: Iterable[list[int]],
    data: DataSettings,
    *,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Tensor]:
    """Yield batches of all views of some images.

    Args:
        images: Views of the images of a split.
        batches: Indices of the images of each batch.
        data: Settings of the workers.
        device: Device of the batches.
        ranks: Ranks, which share the cores of this machine.

    Yields:
        [B x V, 3, H, W] uint8 on the device; the V views of an image are consecutive.
    """
    return _batches(images.batch, batches, worker_count(data.workers, device, ranks), device)


def center_crops(split: Split, indices: Iterable[int], *, resolution: Resolution, device: torch.device) -> Tensor:
    """Return the centre crops of some images, [B, 3, H, W] uint8 on the device."""
    return _center_crops(split, resolution).batch([(0, index) for index in indices]).to(device)


def _center_crops(split: Split, resolution: Resolution) -> Crops:
    return Crops(split, resolution, random=False, flip=False, seed=0)


def _batches(
    make: Callable[..., Tensor], batches: Iterable[Sequence[_Key]], workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield the batches on the device, in order: made in this thread with no workers, else ahead in threads."""
    if workers == 0:
        for keys in batches:
            yield make(keys).to(device)
        return
    is_on_gpu = device.type == "cuda"
    # Pinned memory belongs to the current GPU of a thread, which is the first one in a new thread.
    start_thread = partial(torch.cuda.set_device, device) if is_on_gpu and device.index is not None else None
    make_pinned = partial(make, pinned=is_on_gpu)
    for batch in map_ahead(make_pinned, batches, threads=workers, ahead=_AHEAD * workers, start_thread=start_thread):
        yield batch.to(device, non_blocking=True)


def worker_count(workers: int, device: torch.device, ranks: Ranks) -> int:
    """Return the number of decoding threads of a rank.

    Args:
        workers: The setting; -1 chooses by the device and the cores.
        device: Device of the batches.
        ranks: Ranks, which share the cores of this machine.
    """
    if workers >= 0:
        return workers
    # On the CPU the model uses all cores.
    return max(1, allowed_cores() // ranks.local_world_size - 1) if device.type == "cuda" else 0


def check_size(images: PreparedSet, settings: TokenizerSettings) -> None:
    """Refuse training images that are larger than the smallest image of a prepared set.

    Args:
        images: The prepared set.
        settings: Settings of the tokenizer.

    Raises:
        BadRequestError: The training images are larger; the message has both sizes and the remedy.
    """
    size = settings.image_size
    smallest = images.smallest_size(size)
    if size.fits_into(smallest):
        return
    found, trained = f"of {smallest.height} pixels", f"{size}"
    if not size.is_square:
        found = f"that are only {smallest.height} pixels high or {smallest.width} pixels wide"
        trained = size.in_words
    raise BadRequestError(
        f"the prepared set {images.root} has images {found}, smaller than the preset's {trained}",
        f"Prepare it with --size {size}{_at_their_size(smallest, settings)}.",
    )


def _at_their_size(smallest: ImageSize, settings: TokenizerSettings) -> str:
    """Return the end of a hint that names the largest resolution for images of a size; empty if there is none."""
    largest = ImageSize(*(side // settings.factor * settings.factor for side in smallest))
    try:
        TokenizerSettings.model_validate({**settings.model_dump(), "resolution": largest.resolution})
    except ValidationError:
        return ""
    setting = f"vq.resolution={largest}" if largest.is_square else f"'vq.resolution=[{largest.height},{largest.width}]'"
    return f", or train at their size with -o {setting}"


def _steps(order: EpochOrder, start: int, ranks: Ranks) -> Iterator[list[CropKey]]:
    """Yield a rank's share of the images of each step, without end."""
    for step in count(start):
        epoch, indices = order.batch(step)
        yield [(epoch, int(index)) for index in indices[ranks.share(len(indices))]]
