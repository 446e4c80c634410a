"""Images of a source as tensors: decoded ahead in threads, and stacked with others of the same size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from movq_cli.cores import allowed_cores
from movq_cli.data import pixels
from movq_cli.data.images import MAX_PIXELS, BadImageError, ImageOutOfMemoryError, declared_pixels, decode
from movq_cli.data.prefetch import map_ahead
from movq_cli.errors import is_out_of_memory
from movq_cli.sources.source import Source

T = TypeVar("T")

_DECODERS = min(8, allowed_cores())

_PIXELS_AHEAD = MAX_PIXELS
"""Largest number of pixels of the images that are decoded ahead: as many as one image may have."""

_WAITING_BYTES = 2**30
"""Largest size of the images that wait for others of their size; that of 340 images of 1,024 pixels a side."""


def decoded(source: Source, indices: Iterable[int]) -> Iterator[tuple[int, Tensor | BadImageError]]:
    """Decode images of a source, a bounded number of them ahead.

    Args:
        source: The source.
        indices: Indices of the images, in the order in which they are yielded.

    Yields:
        Each index with the image's pixels, uint8 [3, H, W], or with the error that says why it cannot be used.
    """
    return mapped(source, indices, _decode_pixels)


def mapped(
    source: Source, indices: Iterable[int], work: Callable[[bytes], T]
) -> Iterator[tuple[int, T | BadImageError]]:
    """Apply a function to files of a source in threads, a bounded number of them ahead.

    Args:
        source: The source.
        indices: Indices of the images, in the order in which they are yielded.
        work: Function that is called in a thread with the bytes of a file; it may raise `BadImageError`.

    Yields:
        Each index with the result, or with the error that says why the image cannot be used. Of these,
        `ImageOutOfMemoryError` is no property of the image: a command that leaves it out must not end with success.
    """

    def attempt(file: tuple[int, bytes | BadImageError]) -> tuple[int, T | BadImageError]:
        index, data = file
        if isinstance(data, BadImageError):
            return index, data
        try:
            return index, work(data)
        except BadImageError as error:
            return index, error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return index, ImageOutOfMemoryError("out of memory")

    # The files are read in the calling thread, in order: an archive serves one reader at a time anyway.
    files = ((index, _read(source, index)) for index in indices)
    return map_ahead(
        attempt,
        files,
        threads=_DECODERS,
        ahead=4 * _DECODERS,
        cost=lambda file: 0 if isinstance(file[1], BadImageError) else min(declared_pixels(file[1]), MAX_PIXELS),
        budget=_PIXELS_AHEAD,
    )


def same_size_batches(images: Iterable[tuple[int, Tensor]], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack images of the same shape. A batch is smaller than `batch_size` if the images would take too much memory.

    Args:
        images: Pairs of an index and an image [...].
        batch_size: Largest number of images in a batch.

    Yields:
        The indices [B] and the images [B, ...] of a batch, B at most `batch_size`.
    """
    waiting: dict[torch.Size, list[tuple[int, Tensor]]] = defaultdict(list)
    count = size = 0
    for index, image in images:
        waiting[image.shape].append((index, image))
        count += 1
        size += image.nbytes
        fullest = max(waiting.values(), key=len)
        # The other bounds limit the memory for a set of a thousand sizes, whose batches would never fill up.
        if len(fullest) == batch_size or count > 4 * batch_size or size > _WAITING_BYTES:
            del waiting[fullest[0][1].shape]
            count -= len(fullest)
            size -= sum(image.nbytes for _, image in fullest)
            yield _stack(fullest)
    yield from map(_stack, waiting.values())


def _stack(images: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    indices, tensors = zip(*images, strict=True)
    return torch.tensor(indices), torch.stack(tensors)


def _read(source: Source, index: int) -> bytes | BadImageError:
    try:
        return source.read(index)
    except BadImageError as error:
        return error
    except MemoryError:
        return ImageOutOfMemoryError("out of memory")


def _decode_pixels(data: bytes) -> Tensor:
    return pixels.from_array(np.asarray(decode(data)))
