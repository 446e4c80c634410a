"""Code cache: the codes of all views of a split, encoded once, memory-mapped, and bound to their tokenizer.

    TOKENS/<data>-train-1.1-1.05-mirror/begun.json   description of the cache in progress, written first
                                        blocks/      the codes so far, one file for each block of images
                                        codes.npy    the codes of all blocks
                                        labels.npy   the labels, if the set has classes
                                        header.json  same as begun.json, written last; then the first two are removed

`movq_cli.data.blocks` explains how any number of ranks make a cache, and how a killed run is resumed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from movq_cli import digests
from movq_cli.console import Console, Progress
from movq_cli.data import loader, pixels
from movq_cli.data.blocks import Arrays, Blocks, locked_in_turn
from movq_cli.data.shards import Split
from movq_cli.digests import Header
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_file
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.settings import DataSettings, ViewSettings

BLOCK_VIEWS = 2048
"""Largest number of image views in a block, which a killed run has to encode again: some seconds of work on a GPU, and
4 MiB of 16 x 16 x 4 codes. The 26 million views of ImageNet need some 12,600 files until they are joined."""

_REMEDY = "Remove the folder, and run `movq train-prior` again: it encodes the images anew."

HEADER = "header.json"
"""Name of the header of a complete cache."""

_IN_PROGRESS, _CODES, _LABELS, _BLOCKS = "begun.json", "codes.npy", "labels.npy", "blocks"


class CodeCacheHeader(Header):
    """The content of `header.json`. The file is written last, so that a cache that has it is complete."""

    tokenizer: str
    """SHA-256 of the tokenizer's weight file."""
    data: str
    """Hash of the prepared set."""
    split: str
    """Name of the split."""
    views: int
    """Number of code maps; those of one image are consecutive."""
    view_settings: ViewSettings = ViewSettings()
    """Settings of the views of each image."""
    classes: tuple[str, ...]
    """Names of the classes; empty if the set has none."""
    files: dict[str, str] = Field({})
    """Digest of each array file; empty while the cache is in progress."""


class CodeCache:
    """Codes [V, h, w, c] uint16 and, if the set has classes, labels [V] int64; both are memory-mapped."""

    def __init__(self, folder: Path, header: CodeCacheHeader) -> None:
        self.header = header
        self.codes: NDArray[np.uint16] = np.load(folder / _CODES, mmap_mode="r")
        self.labels: NDArray[np.int64] | None = np.load(folder / _LABELS, mmap_mode="r") if header.classes else None

    def __len__(self) -> int:
        return self.header.views


def open_cache(folder: Path, expected: CodeCacheHeader, *, checked: bool = False) -> CodeCache:
    """Open the cache in a folder.

    Args:
        folder: Folder of the cache.
        expected: Header that the cache must have; its digests do not matter.
        checked: Whether another rank has compared the files with their digests already, which reads them completely.

    Raises:
        BadRequestError: The folder holds no complete cache, a damaged one, or one of another tokenizer, other images or
            other views.
    """
    header = _check(folder, folder / HEADER, expected)
    if not checked:
        check_files(folder, header)
    return CodeCache(folder, header)


def check_files(folder: Path, header: CodeCacheHeader) -> None:
    """Compare the array files of a complete cache with their digests.

    Raises:
        BadRequestError: A file is damaged or missing.
    """
    digests.check_files(folder, _array_files(header), header.files, _REMEDY)


def read_cache_header(folder: Path) -> CodeCacheHeader:
    """Read the header of the complete cache in a folder.

    Raises:
        BadRequestError: The folder holds no complete cache, or its header is damaged.
    """
    return _read_header(folder, folder / HEADER)


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
    """Return the cache of a split, which is made first if it does not exist. Every rank must call this.

    Args:
        folder: Folder of all caches of this tokenizer; each split with its views has a folder in it.
        model: Tokenizer, on the device and in eval mode.
        split: Images to encode.
        loading: Settings of the workers.
        views: Settings of the views of each image.
        name: Name of the split.
        data: Hash of the prepared set.
        tokenizer: SHA-256 of the tokenizer's weight file.
        batch_size: Number of image views that are encoded at once; the views of one image are not separated.
        device: Device of the tokenizer.
        ranks: Ranks that share the work.
        console: Console that shows the progress.

    Raises:
        BadRequestError: The cache is damaged.
    """
    header = CodeCacheHeader(
        tokenizer=tokenizer,
        data=data,
        split=name,
        views=len(split) * views.count,
        view_settings=views,
        classes=tuple(split.classes),
    )
    folder = folder / _folder_name(header)
    if not ranks.from_first(lambda: _is_complete(folder, header)):
        images = loader.Views(split, model.settings.image_size, views)
        _make(folder, header, model, images, loading, batch_size, device, ranks, console)
    elif ranks.is_first:
        with suppress(OSError):  # A cache that may only be read is read.
            _clear(folder, _blocks(folder, header))  # A run that was killed at the very end has left its blocks.
    return open_cache(folder, header, checked=not ranks.is_first)


def _is_complete(folder: Path, expected: CodeCacheHeader) -> bool:
    """Return whether the codes of this tokenizer are there.

    Raises:
        BadRequestError: The header is damaged.
    """
    return (folder / HEADER).is_file() and _read_header(folder, folder / HEADER).tokenizer == expected.tokenizer


def _remove_codes_of_another_tokenizer(folder: Path, expected: CodeCacheHeader, console: Console) -> None:
    """Remove a cache, complete or in progress, that another tokenizer has made, because it is made again.

    Raises:
        BadRequestError: The header is damaged, or the cache cannot be removed.
    """
    headers = [folder / name for name in (HEADER, _IN_PROGRESS) if (folder / name).is_file()]
    if all(_read_header(folder, file).tokenizer == expected.tokenizer for file in headers):
        return
    console.warn(f"the codes in {folder} were made by another tokenizer; they are made again")
    try:
        for name in (HEADER, _CODES, _LABELS, _IN_PROGRESS):  # The header goes first: without it none is complete.
            (folder / name).unlink(missing_ok=True)
        if (folder / _BLOCKS).exists():
            shutil.rmtree(folder / _BLOCKS)
    except OSError as error:
        raise BadRequestError(
            f"the codes in {folder} were made by another tokenizer, and cannot be removed ({error.strerror})",
            "Name another folder with --codes.",
        ) from None


def _folder_name(header: CodeCacheHeader) -> str:
    """Return a readable name, different for other views; the name for the centre crop only has no views in it."""
    views = [*(f"{scale:g}" for scale in header.view_settings.scales), *(["mirror"] * header.view_settings.mirror)]
    return "-".join([header.data[:12], header.split, *views])


def _make(
    folder: Path,
    header: CodeCacheHeader,
    model: Tokenizer,
    images: loader.Views,
    loading: DataSettings,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
    console: Console,
) -> None:
    """Encode the missing blocks, all ranks together, and complete the cache.

    If another command is making the cache, it is waited for; nothing is left to do if it completes the cache.
    """
    blocks = _blocks(folder, header)
    with ranks.long_barrier() as barrier, locked_in_turn(folder, "movq train-prior", ranks, console):
        barrier()  # Without a timeout: rank 0 may have waited for hours.
        missing = ranks.from_first(lambda: _begin(folder, header, blocks, console))
        if missing is None:
            return
        done = header.views - blocks.rows * sum(map(len, missing))
        with console.progress(header.views, f"encoding {header.split}", "image views", done) as progress:
            size = max(1, batch_size // blocks.rows)
            encoded = partial(
                _encoded, model, images, size=size, loading=loading, device=device, ranks=ranks, progress=progress
            )
            blocks.make(missing, encoded, ranks, barrier, progress)
        if ranks.is_first:
            _finish(folder, header, blocks, images.split.labels)
        barrier()


def _begin(folder: Path, header: CodeCacheHeader, blocks: Blocks, console: Console) -> list[range] | None:
    """Write the description of the cache in progress, or check it, and return the missing blocks; None if complete."""
    _remove_codes_of_another_tokenizer(folder, header, console)
    if (folder / HEADER).is_file():
        return None
    in_progress = folder / _IN_PROGRESS
    if in_progress.is_file():
        _check(folder, in_progress, header)
    else:
        digests.write_header(in_progress, header)
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
    """Yield blocks with their codes [V, h, w, c]. A batch has `size` images, all of one block.

    The tokenizer runs in float32: rounding a feature to bf16 may change its code, and a prior must learn the codes that
    all other commands compute for the same image. Speed matters little, because the views are encoded only once.
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


def _finish(folder: Path, header: CodeCacheHeader, blocks: Blocks, labels: NDArray[np.int64] | None) -> None:
    """Join the blocks, none of which is missing, and write the header.

    Args:
        folder: Folder of the cache.
        header: Header of the cache.
        blocks: Blocks of the codes.
        labels: Labels of the images [N]; None = the set has no classes.
    """
    blocks.join("codes", folder / _CODES)
    if labels is not None:
        with atomic_file(folder / _LABELS) as file:
            np.save(file, np.repeat(labels, blocks.rows))
    files = digests.of_files(folder, _array_files(header))
    digests.write_header(folder / HEADER, header.model_copy(update={"files": files}))
    _clear(folder, blocks)


def _clear(folder: Path, blocks: Blocks) -> None:
    """Remove the files that a complete cache does not need."""
    blocks.clear()
    (folder / _IN_PROGRESS).unlink(missing_ok=True)


def _blocks(folder: Path, header: CodeCacheHeader) -> Blocks:
    count = header.view_settings.count
    return Blocks(folder / _BLOCKS, header.views // count, max(1, BLOCK_VIEWS // count), count)


def _array_files(header: CodeCacheHeader) -> list[str]:
    return [_CODES, _LABELS] if header.classes else [_CODES]


def _read_header(folder: Path, file: Path) -> CodeCacheHeader:
    try:
        return digests.read_header(file, CodeCacheHeader, _REMEDY)
    except (FileNotFoundError, NotADirectoryError):
        raise BadRequestError(f"{folder} holds no complete code cache", _REMEDY) from None


def _check(folder: Path, file: Path, expected: CodeCacheHeader) -> CodeCacheHeader:
    """Refuse a cache, complete or in progress, whose header differs from the expected one; return its header."""
    header = _read_header(folder, file)
    if header.tokenizer != expected.tokenizer:
        raise BadRequestError(
            f"the codes in {folder} were made by another tokenizer "
            f"({header.tokenizer[:12]}, not {expected.tokenizer[:12]})",
            f"{_REMEDY} Or choose the tokenizer that made them.",
        )
    differing = [name for name, value in expected if name not in {"digest", "files"} and getattr(header, name) != value]
    if differing:
        raise BadRequestError(
            f"the codes in {folder} are of other images or views ({file.name} differs in {', '.join(differing)})",
            _REMEDY,
        )
    return header
