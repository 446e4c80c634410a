"""Batches of the prepared set: decoded ahead in threads, uint8 until they are on the device.

Threads, not processes: what takes the time (reading, zlib, copies) runs outside the interpreter's lock, and a batch is
written once, into memory that the device copies from. Between processes it would pass through shared memory, which
takes longer than the decoding of an uncompressed set and is 64 MiB in a container; and a process can be killed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from movq_cli.data import views
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.shards import Split
from movq_cli.errors import BadRequestError
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.settings import DataSettings, ViewSettings

Place = tuple[int, int]
"""(epoch, image): what a crop is drawn from, beside the seed."""


_Wanted = TypeVar("_Wanted")
_AHEAD = 2
"""Batches that wait ready for each thread."""


class Crops:
    """Square crops of a split: a pure function of seed, epoch and image.

    Args:
        split: Of the prepared set.
        side: Pixels.
        random: Crops anywhere; else at the centre.
        flip: Half of the crops, drawn at random, are mirrored.
        seed: Of the random places.
    """

    def __init__(self, split: Split, side: int, *, random: bool, flip: bool, seed: int) -> None:
        self.split = split
        self.side = side
        self.random = random
        self.flip = flip
        self.seed = seed

    def batch(self, places: Sequence[Place], *, pinned: bool = False) -> Tensor:
        """The crops [B, 3, side, side] uint8, in memory that a GPU copies from by itself where it is `pinned`."""
        batch = torch.empty(len(places), 3, self.side, self.side, dtype=torch.uint8, pin_memory=pinned)
        # By numpy, here and in the views: torch's own copy of turned pixels takes four times as long.
        for row, place in zip(batch.numpy(), places, strict=True):
            row[...] = self._crop(*place).transpose(2, 0, 1)
        return batch

    def _crop(self, epoch: int, index: int) -> NDArray[np.uint8]:
        image = self.split.pixels(index)
        spare = np.array(image.shape[:2]) - self.side
        top, left = spare // 2
        mirrored = False
        if self.flip or (self.random and spare.any()):
            rng = np.random.default_rng((self.seed, epoch, index))
            if self.random:
                top, left = rng.integers(0, spare + 1)
            mirrored = self.flip and rng.random() < 0.5
        crop = image[top : top + self.side, left : left + self.side]
        return crop[:, ::-1] if mirrored else crop


class Views:
    """All views of each image of a split: it is decoded once for all of them.

    Args:
        split: Of the prepared set.
        side: Pixels.
        settings: Which views.
    """

    def __init__(self, split: Split, side: int, settings: ViewSettings) -> None:
        self.split = split
        self.side = side
        self.settings = settings

    def batch(self, indices: Sequence[int], *, pinned: bool = False) -> Tensor:
        """The views [B x V, 3, side, side] uint8, those of one image one after the other; `pinned` as for crops."""
        shape = (len(indices), self.settings.count, 3, self.side, self.side)
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        for rows, index in zip(batch.numpy(), indices, strict=True):
            rows[...] = views.of_image(self.split.pixels(index), self.side, self.settings)
        return batch.flatten(0, 1)


def training_batches(
    split: Split,
    order: EpochOrder,
    data: DataSettings,
    *,
    side: int,
    seed: int,
    start: int,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Tensor]:
    """A rank's share of the batches, [B, 3, side, side] uint8 on the device, without end, from a step on.

    Args:
        split: The training split.
        order: Which images each step sees.
        data: Crop and workers.
        side: Pixels.
        seed: Of the random crops.
        start: The first step's number, for a run that goes on.
        device: Where the batches are wanted.
        ranks: Which share.
    """
    crops = Crops(split, side, random=data.crop == "random", flip=data.flip, seed=seed)
    return _batches(crops.batch, _steps(order, start, ranks), worker_count(data.workers, device, ranks), device)


def validation_batches(
    split: Split,
    data: DataSettings,
    *,
    side: int,
    batch_size: int,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Tensor]:
    """A rank's share of a split, once, in order, centre crops, [B, 3, side, side] uint8 on the device.

    Args:
        split: The split.
        data: Workers.
        side: Pixels.
        batch_size: Images at once.
        device: Where the batches are wanted.
        ranks: Which share.
    """
    wanted = [(0, index) for index in range(len(split))[ranks.share(len(split))]]
    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    return _batches(_centre(split, side).batch, batches, worker_count(data.workers, device, ranks), device)


def view_batches(
    wanted: Views,
    batches: Iterable[list[int]],
    data: DataSettings,
    *,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Tensor]:
    """Views of images, those of one image one after the other, [B x V, 3, side, side] uint8 on the device.

    Args:
        wanted: Views of which images.
        batches: Indices of the images of each batch.
        data: Workers.
        device: Where the batches are wanted.
        ranks: Who shares this machine's cores.
    """
    return _batches(wanted.batch, batches, worker_count(data.workers, device, ranks), device)


def center_crops(split: Split, indices: Iterable[int], *, side: int, device: torch.device) -> Tensor:
    """These images' centre crops, [B, 3, side, side] uint8 on the device."""
    return _centre(split, side).batch([(0, index) for index in indices]).to(device)


def _centre(split: Split, side: int) -> Crops:
    return Crops(split, side, random=False, flip=False, seed=0)


def _batches(
    make: Callable[..., Tensor], wanted: Iterable[Sequence[_Wanted]], workers: int, device: torch.device
) -> Iterator[Tensor]:
    """What is made of each, in order and on the device: here, or ahead in as many threads."""
    if workers == 0:
        for places in wanted:
            yield make(places).to(device)
        return
    on_gpu = device.type == "cuda"
    # Pinned memory belongs to the GPU that a thread has chosen, which for a new thread is the first one.
    enter = partial(torch.cuda.set_device, device) if on_gpu and device.index is not None else None
    with ThreadPoolExecutor(workers, "loader", enter) as pool:
        waiting: deque[Future[Tensor]] = deque()
        try:
            for places in wanted:
                waiting.append(pool.submit(make, places, pinned=on_gpu))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result().to(device, non_blocking=True)
            while waiting:
                yield waiting.popleft().result().to(device, non_blocking=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def worker_count(workers: int, device: torch.device, ranks: Ranks) -> int:
    """Decoding threads of a rank for a setting in which -1 leaves the choice to us."""
    if workers >= 0:
        return workers
    # On the CPU the cores are busy with the model.
    return max(1, (os.cpu_count() or 2) // ranks.local_world_size - 1) if device.type == "cuda" else 0


def check_side(min_side: int, side: int, path: object) -> None:
    """Refuse crops larger than the smallest image of a prepared set.

    Raises:
        BadRequestError: With both sizes and the remedy.
    """
    if min_side < side:
        raise BadRequestError(
            f"the prepared set {path} has images of {min_side} pixels, smaller than the preset's {side}",
            f"Prepare it with --size {side}, or train at their size with -o vq.resolution={min_side}.",
        )


def _steps(order: EpochOrder, start: int, ranks: Ranks) -> Iterator[list[Place]]:
    """A rank's share of each step's images, for ever."""
    for step in count(start):
        epoch, indices = order.batch(step)
        yield [(epoch, int(index)) for index in indices[ranks.share(len(indices))]]
