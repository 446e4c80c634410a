"""A source's images as tensors: decoded ahead in threads, stacked with others of their size."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from movq_cli.data import pixels
from movq_cli.data.images import BadImageError, decode
from movq_cli.data.sources import Source

_DECODERS = min(8, os.cpu_count() or 1)


def decoded(source: Source, indices: Iterable[int]) -> Iterator[tuple[int, Tensor | BadImageError]]:
    """Images of a source in the order of the indices, a bounded number of them decoded ahead.

    Args:
        source: Where from.
        indices: Which.

    Yields:
        Each index with its pixels, uint8 [3, H, W], or with what is wrong with the image.
    """
    with ThreadPoolExecutor(_DECODERS) as pool:
        waiting: deque[tuple[int, Future[Tensor]]] = deque()
        for index in indices:
            waiting.append((index, _start(source, index, pool)))
            if len(waiting) > 4 * _DECODERS:
                yield _settle(*waiting.popleft())
        while waiting:
            yield _settle(*waiting.popleft())


def same_size_batches(images: Iterable[tuple[int, Tensor]], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack images of one shape: their places [B] and the images [B, ...], B at most `batch_size`."""
    waiting: dict[torch.Size, list[tuple[int, Tensor]]] = defaultdict(list)
    count = 0
    for place, image in images:
        waiting[image.shape].append((place, image))
        count += 1
        fullest = max(waiting.values(), key=len)
        # The second bound keeps a set of a thousand sizes from waiting in memory for their like.
        if len(fullest) == batch_size or count > 4 * batch_size:
            del waiting[fullest[0][1].shape]
            count -= len(fullest)
            yield _stack(fullest)
    yield from map(_stack, waiting.values())


def _stack(images: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    places, tensors = zip(*images, strict=True)
    return torch.tensor(places), torch.stack(tensors)


def _start(source: Source, index: int, pool: ThreadPoolExecutor) -> Future[Tensor]:
    try:
        # Read here, decode there: an archive's handle serves one thread.
        return pool.submit(_pixels, source.read(index))
    except BadImageError as error:
        failed: Future[Tensor] = Future()
        failed.set_exception(error)
        return failed


def _settle(index: int, image: Future[Tensor]) -> tuple[int, Tensor | BadImageError]:
    try:
        return index, image.result()
    except BadImageError as error:
        return index, error


def _pixels(data: bytes) -> Tensor:
    return pixels.from_array(np.asarray(decode(data)))
