"""A source's images as tensors: decoded ahead in threads, stacked with others of their size."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from movq_cli.data import pixels
from movq_cli.data.images import BadImageError, decode
from movq_cli.sources.source import Source

T = TypeVar("T")

_DECODERS = min(8, os.cpu_count() or 1)


def decoded(source: Source, indices: Iterable[int]) -> Iterator[tuple[int, Tensor | BadImageError]]:
    """Images of a source in the order of the indices, a bounded number of them decoded ahead.

    Args:
        source: Where from.
        indices: Which.

    Yields:
        Each index with its pixels, uint8 [3, H, W], or with what is wrong with the image.
    """
    return mapped(source, indices, _pixels)


def mapped(
    source: Source, indices: Iterable[int], work: Callable[[bytes], T]
) -> Iterator[tuple[int, T | BadImageError]]:
    """What threads make of the files of a source, in the order of the indices, a bounded number of them ahead.

    Args:
        source: Where from.
        indices: Which.
        work: Called in a thread with a file's bytes.

    Yields:
        Each index with what was made of it, or with what is wrong with the image.
    """
    with ThreadPoolExecutor(_DECODERS) as pool:
        waiting: deque[tuple[int, Future[T | BadImageError]]] = deque()
        for index in indices:
            waiting.append((index, _start(source, index, work, pool)))
            if len(waiting) > 4 * _DECODERS:
                first, made = waiting.popleft()
                yield first, made.result()
        for later, made in waiting:
            yield later, made.result()


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


def _start(
    source: Source, index: int, work: Callable[[bytes], T], pool: ThreadPoolExecutor
) -> Future[T | BadImageError]:
    try:
        # Read here, work there: an archive's handle serves one thread.
        return pool.submit(_attempt, work, source.read(index))
    except BadImageError as error:
        failed: Future[T | BadImageError] = Future()
        failed.set_result(error)
        return failed


def _attempt(work: Callable[[bytes], T], data: bytes) -> T | BadImageError:
    try:
        return work(data)
    except BadImageError as error:
        return error


def _pixels(data: bytes) -> Tensor:
    return pixels.from_array(np.asarray(decode(data)))
