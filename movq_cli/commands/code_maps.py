"""Folders of code maps: which files they are, and how `movq reconstruct` decodes them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from movq_cli import digests
from movq_cli.console import Console
from movq_cli.data import pixels
from movq_cli.data.array_files import is_integer, load_array
from movq_cli.data.coding import decode_batch, naming_images
from movq_cli.data.images import encode_png
from movq_cli.digests import NO_DIGEST
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import TokenizerSettings
from movq_cli.sources.labels import is_image
from movq_cli.sources.output_mark import is_output_inside
from movq_cli.sources.outputs import mark_output, refuse_collisions


def find_maps(folder: Path) -> list[Path]:
    """Return the code maps in a folder, sorted, without those that a command has written from images in this folder.

    A folder that also holds images is one of images: then there are none.
    """
    if not folder.is_dir():
        return []
    found = _without_outputs(folder, sorted(folder.rglob("*.npy")))
    return [] if found and _has_other_images(folder, found) else found


def _has_other_images(folder: Path, maps: Sequence[Path]) -> bool:
    """Return whether a folder holds images that are not the decoded images of code maps."""
    decoded = {path.with_suffix("") for path in maps}
    named = (path for path in folder.rglob("*") if is_image(path.name) and not path.is_dir())
    images = [path for path in named if path.with_suffix("") not in decoded]
    return len(_without_outputs(folder, images)) > 0


def _without_outputs(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Return the files in a folder without those in hidden folders and in folders that a command has written."""
    root = folder.resolve()
    parents = {parent for path in paths for parent in path.parents if parent != folder and folder in parent.parents}
    left_out = {parent for parent in parents if parent.name.startswith(".") or is_output_inside(parent, root)}
    return [path for path in paths if left_out.isdisjoint(path.parents) and not path.name.startswith(".")]


def decode_maps(model: Tokenizer, folder: Path, maps: Sequence[Path], out: Path, console: Console) -> None:
    """Decode each code map below a folder to a PNG file of the same name, one at a time because sizes differ.

    Args:
        model: Tokenizer that decodes the maps.
        folder: Folder of the code maps.
        maps: Paths of the code maps, `.npy` files.
        out: Folder for the PNG files.
        console: Console for the progress and the result.

    Raises:
        BadRequestError: A file is not a code map of this tokenizer, or two outputs would have the same path.
    """
    device = model.device
    outputs = [out / path.relative_to(folder).with_suffix(".png") for path in maps]
    refuse_collisions(outputs)
    mark_output(out, str(folder))
    with console.progress(len(maps), "decoding", "code maps") as progress:
        for path, output in zip(maps, outputs, strict=True):
            codes = torch.from_numpy(read_map(path, model.settings).astype(np.int64))[None].to(device)
            factor = model.settings.factor
            size = (codes.shape[1] * factor, codes.shape[2] * factor)
            with naming_images([str(path)], size):
                (image,) = decode_batch(model, codes, size)
            atomic_write(output, encode_png(pixels.to_image(image)))
            progress.advance()
    console.result({"path": str(out), "images": len(maps)}, str(out))


def read_map(path: Path, settings: TokenizerSettings) -> NDArray[np.integer[Any]]:
    """Return the code map [h, w, c] of an `.npy` file.

    Args:
        path: File to read.
        settings: Settings of the tokenizer that made the codes.

    Raises:
        BadRequestError: The file does not contain codes of this tokenizer.
    """
    digests.check(path, "Make it again with `movq reconstruct --codes`.", required=False)
    codes = load_array(path)
    if not is_integer(codes) or codes.ndim != 3 or codes.shape[2] != settings.chunks or not codes.size:
        found = f"{codes.dtype} {list(codes.shape)}"
        raise BadRequestError(f"{path} holds {found}, not a code map of integers [h, w, {settings.chunks}]")
    if codes.min() < 0 or codes.max() >= settings.codebook_size:
        raise BadRequestError(f"{path} holds codes outside of the codebook, which has {settings.codebook_size} entries")
    return codes


def encode_map(codes: Tensor) -> bytes:
    """Return the content of the `.npy` file of a code map [h, w, c]."""
    buffer = io.BytesIO()
    np.save(buffer, codes.numpy().astype(np.uint16))
    return digests.with_digest(buffer.getvalue() + NO_DIGEST.encode())  # Readers of arrays ignore what follows them.
