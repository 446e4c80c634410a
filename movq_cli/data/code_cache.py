"""The code cache: a split's image views as codes, encoded once, memory-mapped, tied to the tokenizer that made them.

    TOKENS/<data>-train-1.1-1.05-mirror/begun.json   what is being encoded, written first
                                        blocks/      the codes so far, a file for some images in a row
                                        codes.npy    all blocks joined
                                        labels.npy
                                        header.json  as begun.json, written last; then the first two are removed

See `blocks` for how it is made by any number of ranks, and goes on where a killed run was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from movq_cli.console import Console, Progress
from movq_cli.data import loader, pixels
from movq_cli.data.blocks import Arrays, Blocks
from movq_cli.data.shards import Split
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_path, atomic_write, locked
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.settings import DataSettings, Settings, ViewSettings

BLOCK_VIEWS = 2048
"""Image views in a block, at most: what a killed run has to encode again, some seconds' work on a GPU. 4 MiB of 16 x 16
x 4 codes; ImageNet's 26 million views make some 12,600 files for the time being."""

_HEADER, _BEGUN, _CODES, _LABELS, _BLOCKS = "header.json", "begun.json", "codes.npy", "labels.npy", "blocks"


class CodeCacheHeader(Settings):
    """What `header.json` says; it is written last, so that a cache with one is whole."""

    tokenizer: str
    """SHA-256 of the tokenizer's weight file."""
    data: str
    """Hash of the prepared set."""
    split: str
    views: int
    """Code maps, those of one image one after the other."""
    view_settings: ViewSettings = ViewSettings()
    """Which views of each image."""
    classes: tuple[str, ...]


class CodeCache:
    """Codes [V, h, w, c] uint16 and, where the set has classes, labels [V] int64, both memory-mapped."""

    def __init__(self, folder: Path, header: CodeCacheHeader) -> None:
        self.header = header
        self.codes: NDArray[np.uint16] = np.load(folder / _CODES, mmap_mode="r")
        self.labels: NDArray[np.int64] | None = np.load(folder / _LABELS, mmap_mode="r") if header.classes else None

    def __len__(self) -> int:
        return self.header.views


def open_cache(folder: Path, wanted: CodeCacheHeader) -> CodeCache:
    """The cache in a folder.

    Raises:
        BadRequestError: There is none, or it is of another tokenizer, other images or other views.
    """
    _check(folder, folder / _HEADER, wanted)
    return CodeCache(folder, wanted)


def load_or_encode(
    folder: Path,
    model: Tokenizer,
    split: Split,
    *,
    loading: DataSettings,
    views: ViewSettings,
    name: str,
    data: str,
    tokenizer: str,
    batch_size: int,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
    console: Console,
) -> CodeCache:
    """The cache of a split, made first where it is not there yet; every rank must ask for it.

    Args:
        folder: Where caches of this tokenizer are kept; each split and views of a prepared set have their own below.
        model: The tokenizer, on the device, in eval mode.
        split: The images.
        loading: Workers.
        views: Which views of each image.
        name: Of the split.
        data: Hash of the prepared set.
        tokenizer: SHA-256 of the tokenizer's weight file.
        batch_size: Image views encoded at once; those of one image are not parted.
        device: Where.
        ranks: Who shares the work.
        console: For the progress.

    Raises:
        BadRequestError: A cache of another tokenizer is in the way, or another command is making this one.
    """
    header = CodeCacheHeader(
        tokenizer=tokenizer,
        data=data,
        split=name,
        views=len(split) * views.count,
        view_settings=views,
        classes=tuple(split.classes),
    )
    place = folder / _folder_name(header)
    if not ranks.from_first((place / _HEADER).is_file):
        images = loader.Views(split, model.settings.resolution, views)
        _make(place, header, model, images, loading, batch_size, device, ranks, console)
    elif ranks.is_first:
        _clear(place, _blocks(place, header))  # a run that was killed at the very end left its blocks
    return open_cache(place, header)


def _folder_name(header: CodeCacheHeader) -> str:
    """Readable: another setting of views has a folder of its own, the plain centre crop has none to name."""
    views = [*(f"{scale:g}" for scale in header.view_settings.scales), *(["mirror"] * header.view_settings.mirror)]
    return "-".join([header.data[:12], header.split, *views])


def _make(
    place: Path,
    header: CodeCacheHeader,
    model: Tokenizer,
    images: loader.Views,
    loading: DataSettings,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
    console: Console,
) -> None:
    """Encode what an earlier run has not, all ranks together, and put the cache in place."""
    blocks = _blocks(place, header)
    with ranks.long_barrier() as barrier, locked(place, "movq train-prior") if ranks.is_first else nullcontext():
        missing = ranks.from_first(lambda: _begin(place, header, blocks))
        done = header.views - blocks.rows * sum(map(len, missing))
        with console.progress(header.views, f"encoding {header.split}", "image views", done) as progress:
            size = max(1, batch_size // blocks.rows)
            encoded = partial(
                _encoded, model, images, size=size, loading=loading, device=device, ranks=ranks, progress=progress
            )
            blocks.make(missing, encoded, ranks, barrier, progress)
        if ranks.is_first:
            _finish(place, header, blocks, images.split.labels)
        barrier()


def _begin(place: Path, header: CodeCacheHeader, blocks: Blocks) -> list[range]:
    """The blocks that are to be encoded, as ranges of images."""
    begun = place / _BEGUN
    if begun.is_file():
        _check(place, begun, header)
    else:
        atomic_write(begun, header.model_dump_json(indent=2).encode())
    return blocks.missing()


def _encoded(
    model: Tokenizer,
    images: loader.Views,
    blocks: list[range],
    *,
    size: int,
    loading: DataSettings,
    device: torch.device,
    ranks: Ranks,
    progress: Progress,
) -> Iterator[tuple[range, Arrays]]:
    """Blocks and their codes [V, h, w, c]; a batch has `size` images and lies in one block.

    In float32: a feature that bf16 rounds may move to another code, and a prior must learn the codes that every other
    command makes of the same image. The views are encoded once, so that speed counts for little.
    """
    parts = [[list(block[start : start + size]) for start in range(0, len(block), size)] for block in blocks]
    loaded = loader.view_batches(
        images, [batch for part in parts for batch in part], loading, device=device, ranks=ranks
    )
    for block, part in zip(blocks, parts, strict=True):
        codes = []
        for batch in islice(loaded, len(part)):
            codes.append(model.encode(pixels.to_signed(batch)))
            progress.advance(len(batch))
        yield block, {"codes": torch.cat(codes).cpu().numpy().astype(np.uint16)}


def _finish(place: Path, header: CodeCacheHeader, blocks: Blocks, labels: NDArray[np.int64] | None) -> None:
    """Join the blocks, which are all there, and write the header; labels are the images'."""
    blocks.join("codes", place / _CODES)
    if labels is not None:
        with atomic_path(place / _LABELS) as aside, aside.open("wb") as file:
            np.save(file, np.repeat(labels, blocks.rows))
    atomic_write(place / _HEADER, header.model_dump_json(indent=2).encode())
    _clear(place, blocks)


def _clear(place: Path, blocks: Blocks) -> None:
    """Remove what a whole cache needs no longer."""
    blocks.clear()
    (place / _BEGUN).unlink(missing_ok=True)


def _blocks(place: Path, header: CodeCacheHeader) -> Blocks:
    count = header.view_settings.count
    return Blocks(place / _BLOCKS, header.views // count, max(1, BLOCK_VIEWS // count), count)


def _check(folder: Path, file: Path, wanted: CodeCacheHeader) -> None:
    """Refuse a cache, whole or begun, that is not the one that is wanted."""
    try:
        header = CodeCacheHeader.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise BadRequestError(
            f"{folder} holds no whole code cache", "Remove the folder to have it made again."
        ) from None
    if header.tokenizer != wanted.tokenizer:
        raise BadRequestError(
            f"the codes in {folder} were made by another tokenizer "
            f"({header.tokenizer[:12]}, not {wanted.tokenizer[:12]})",
            "Remove the folder to have them made again, or name the tokenizer that made them.",
        )
    differing = [name for name, value in wanted if getattr(header, name) != value]
    if differing:
        raise BadRequestError(
            f"the codes in {folder} are of other images or views ({file.name} differs in {', '.join(differing)})",
            "Remove the folder to have them made again.",
        )
