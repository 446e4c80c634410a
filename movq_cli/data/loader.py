"""Batches of the prepared set: decoded in worker processes, uint8 until they are on the device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from movq_cli.data import pixels, views
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.shards import Split
from movq_cli.errors import BadRequestError
from movq_cli.ranks import ALONE, Ranks
from movq_cli.settings import DataSettings, ViewSettings

Place = tuple[int, int]
"""(epoch, image): what a crop is drawn from, beside the seed."""


class Crops(Dataset[Tensor]):
    """Square crops of a split, [3, side, side] uint8: a pure function of seed, epoch and image.

    Args:
        split: Of the prepared set.
        side: Pixels.
        random: Crops anywhere; else at the centre.
        seed: Of the random places.
    """

    def __init__(self, split: Split, side: int, *, random: bool, seed: int) -> None:
        self.split = split
        self.side = side
        self.random = random
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, place: Place) -> Tensor:
        epoch, index = place
        image = self.split.pixels(index)
        spare = np.array(image.shape[:2]) - self.side
        if self.random:
            top, left = np.random.default_rng((self.seed, epoch, index)).integers(0, spare + 1)
        else:
            top, left = spare // 2
        return pixels.from_array(image[top : top + self.side, left : left + self.side])


class Views(Dataset[Tensor]):
    """All views of each image of a split, [V, 3, side, side] uint8: it is decoded once for all of them.

    Args:
        split: Of the prepared set.
        side: Pixels.
        settings: Which views.
    """

    def __init__(self, split: Split, side: int, settings: ViewSettings) -> None:
        self.split = split
        self.side = side
        self.settings = settings

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Tensor:
        return views.of_image(self.split.pixels(index), self.side, self.settings)


def training_batches(
    split: Split,
    order: EpochOrder,
    data: DataSettings,
    *,
    side: int,
    seed: int,
    start: int,
    device: torch.device,
    ranks: Ranks = ALONE,
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
    crops = Crops(split, side, random=data.crop == "random", seed=seed)
    return _batches(crops, _Steps(order, start, ranks), worker_count(data.workers, device, ranks), device)


def validation_batches(
    split: Split,
    data: DataSettings,
    *,
    side: int,
    batch_size: int,
    device: torch.device,
    ranks: Ranks = ALONE,
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
    crops = Crops(split, side, random=False, seed=0)
    return _batches(crops, batches, worker_count(data.workers, device, ranks), device)


def view_batches(
    wanted: Views, batches: Iterable[list[int]], data: DataSettings, *, device: torch.device, ranks: Ranks = ALONE
) -> Iterator[Tensor]:
    """Views of images, those of one image one after the other, [B x V, 3, side, side] uint8 on the device.

    Args:
        wanted: Views of which images.
        batches: Indices of the images of each batch.
        data: Workers.
        device: Where the batches are wanted.
        ranks: Who shares this machine's cores.
    """
    for batch in _batches(wanted, batches, worker_count(data.workers, device, ranks), device):
        yield batch.flatten(0, 1)


def _batches(
    images: Dataset[Tensor],
    batches: Iterable[list[Place]] | Iterable[list[int]],
    workers: int,
    device: torch.device,
) -> Iterator[Tensor]:
    loader = DataLoader(images, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda")
    for batch in loader:
        yield batch.to(device, non_blocking=True)


def center_crops(split: Split, indices: Iterable[int], *, side: int, device: torch.device) -> Tensor:
    """These images' centre crops, [B, 3, side, side] uint8 on the device."""
    crops = Crops(split, side, random=False, seed=0)
    return torch.stack([crops[0, index] for index in indices]).to(device)


def worker_count(workers: int, device: torch.device, ranks: Ranks) -> int:
    """Decoding processes of a rank for a setting in which -1 leaves the choice to us."""
    if workers >= 0:
        return workers
    # On the CPU the cores are busy with the model, and small images decode faster than they cross processes.
    return max(1, (os.cpu_count() or 2) // ranks.neighbours - 1) if device.type == "cuda" else 0


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


class _Steps:
    """A batch sampler that goes on for ever from a step."""

    def __init__(self, order: EpochOrder, start: int, ranks: Ranks) -> None:
        self.order = order
        self.start = start
        self.ranks = ranks

    def __iter__(self) -> Iterator[list[Place]]:
        step = self.start
        while True:
            epoch, indices = self.order.batch(step)
            yield [(epoch, int(index)) for index in indices[self.ranks.share(len(indices))]]
            step += 1
