"""The code cache: a split's images as codes, encoded once, memory-mapped, tied to the tokenizer that made them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from movq_cli.console import Console
from movq_cli.data import loader, pixels
from movq_cli.data.shards import Split
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_path, atomic_write
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import DataSettings, Settings


class TokenHeader(Settings):
    """What `header.json` says; it is written last, so that a cache with one is whole."""

    tokenizer: str
    """SHA-256 of the tokenizer's weight file."""
    data: str
    """Hash of the prepared set."""
    split: str
    views: int
    """Code maps, one an image."""
    classes: tuple[str, ...]


class TokenCache:
    """Codes [V, h, w, c] uint16 and, where the set has classes, labels [V] int64, both memory-mapped."""

    def __init__(self, folder: Path, header: TokenHeader) -> None:
        self.header = header
        self.codes: NDArray[np.uint16] = np.load(folder / "codes.npy", mmap_mode="r")
        self.labels: NDArray[np.int64] | None = np.load(folder / "labels.npy") if header.classes else None

    def __len__(self) -> int:
        return self.header.views


def open_cache(folder: Path, *, tokenizer: str) -> TokenCache:
    """The cache in a folder.

    Raises:
        BadRequestError: There is none, or another tokenizer made it.
    """
    try:
        header = TokenHeader.model_validate(json.loads((folder / "header.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise BadRequestError(
            f"{folder} holds no whole code cache", "Remove the folder to have it made again."
        ) from None
    if header.tokenizer != tokenizer:
        raise BadRequestError(
            f"the codes in {folder} were made by another tokenizer ({header.tokenizer[:12]}, not {tokenizer[:12]})",
            "Remove the folder to have them made again, or name the tokenizer that made them.",
        )
    return TokenCache(folder, header)


def cached(
    folder: Path,
    model: Tokenizer,
    split: Split,
    *,
    loading: DataSettings,
    name: str,
    data: str,
    tokenizer: str,
    batch_size: int,
    device: torch.device,
    console: Console,
) -> TokenCache:
    """The cache of a split, made first where it is not there yet.

    Args:
        folder: Where caches of this tokenizer are kept; each split of each prepared set has its own below.
        model: The tokenizer, on the device, in eval mode.
        split: The images.
        loading: Workers.
        name: Of the split.
        data: Hash of the prepared set.
        tokenizer: SHA-256 of the tokenizer's weight file.
        batch_size: Images encoded at once.
        device: Where.
        console: For the progress.

    Raises:
        BadRequestError: A cache of another tokenizer is in the way.
    """
    place = folder / f"{data[:12]}-{name}"
    if not (place / "header.json").is_file():
        header = TokenHeader(tokenizer=tokenizer, data=data, split=name, views=len(split), classes=tuple(split.classes))
        _encode(place, model, split, loading, header, batch_size, device, console)
    return open_cache(place, tokenizer=tokenizer)


@torch.inference_mode()
def _encode(
    folder: Path,
    model: Tokenizer,
    split: Split,
    loading: DataSettings,
    header: TokenHeader,
    batch_size: int,
    device: torch.device,
    console: Console,
) -> None:
    settings = model.settings
    shape = (len(split), settings.grid, settings.grid, settings.chunks)
    with (
        atomic_path(folder / "codes.npy") as partial,
        console.progress(len(split), f"encoding {header.split}", "images") as progress,
    ):
        codes = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint16, shape=shape)
        done = 0
        side = settings.resolution
        for batch in loader.validation_batches(split, loading, side=side, batch_size=batch_size, device=device):
            codes[done : done + len(batch)] = model.encode(pixels.to_signed(batch)).cpu().numpy()
            done += len(batch)
            progress.advance(len(batch))
        codes.flush()
    if split.labels is not None:
        with atomic_path(folder / "labels.npy") as partial, partial.open("wb") as file:
            np.save(file, np.asarray(split.labels, dtype=np.int64))
    atomic_write(folder / "header.json", header.model_dump_json(indent=2).encode())
