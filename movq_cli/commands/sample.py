"""`movq sample`: draw images from a prior into a folder, and a manifest that says how to draw each again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from movq_cli import __version__, devices, runs
from movq_cli.api import Prior
from movq_cli.console import Console
from movq_cli.data import pixels
from movq_cli.data.images import decode, encode_png
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write, sha256
from movq_cli.presets import explain
from movq_cli.settings import SampleSettings

MANIFEST = "manifest.json"
_GRID_IMAGES = 100
_GRID_COLUMNS = 10


def sample(
    out: Path,
    *,
    n: int,
    run: Path | None,
    tokenizer: Path | None,
    seed: int,
    classes: Sequence[str],
    steps: int | None,
    temperature: float | None,
    choice_temperature: float | None,
    guidance: float | None,
    batch_size: int,
    grid: Path | None,
    device: str | None,
    console: Console,
) -> None:
    """Draw images 0 to n - 1; what an interrupted run has made already is kept.

    Args:
        out: Folder of the PNGs.
        n: Images.
        run: Prior's run folder or weight file; None = the newest finished run.
        tokenizer: Run folder or weight file; None = the one beside the prior.
        seed: Of image 0; image i has seed + i.
        classes: Names or numbers, taken in turn; empty = all.
        steps: Decoding steps; this and the next three: None = the preset's.
        temperature: Of the codes' distribution.
        choice_temperature: Of the confidences.
        guidance: Classifier-free guidance.
        batch_size: Images at once.
        grid: Picture of the first hundred.
        device: Name; None = CUDA where there is one.
        console: Where to speak.
    """
    weights = runs.weights(run, "prior")
    console.log(f"prior: {weights}")
    prior = Prior.load(weights, tokenizer).to(devices.pick(device))
    asked = {
        "steps": steps,
        "temperature": temperature,
        "choice_temperature": choice_temperature,
        "guidance": guidance,
    }
    settings = _settings(prior.header.sample, {name: value for name, value in asked.items() if value is not None})
    if settings.guidance > 0 and not prior.classes:
        raise BadRequestError("guidance needs a class-conditional prior, and this one is unconditional")
    ids = prior.class_ids(classes)
    record = {**settings.model_dump(), "seed": seed, "prior": sha256(weights), "version": __version__}
    _begin(out, record, _describe(prior, n, seed, ids))
    missing = [index for index in range(n) if not (out / file_name(index)).is_file()]
    if len(missing) < n:
        console.log(f"{n - len(missing)} of {n} images are in {out} already")
    with (
        console.progress(n, "sampling", "images", done=n - len(missing)) as progress,
        ThreadPoolExecutor() as encoders,
    ):
        writing: list[Any] = []
        for start in range(0, len(missing), batch_size):
            indices = missing[start : start + batch_size]
            images = pixels.to_bytes(
                prior.sample(len(indices), seed=seed, classes=ids, settings=settings, indices=indices)
            )
            for written in writing:  # one batch is encoded while the next is drawn: memory stays bounded
                written.result()
            writing = [
                encoders.submit(_write, out / file_name(index), image)
                for index, image in zip(indices, images.cpu(), strict=True)
            ]
            progress.advance(len(indices))
        for written in writing:
            written.result()
    result = {"path": str(out), "images": n, "made": len(missing)}
    if grid is not None:
        columns = len(ids) if 1 < len(ids) <= _GRID_COLUMNS else _GRID_COLUMNS
        _save_grid(grid, [out / file_name(index) for index in range(min(n, _GRID_IMAGES))], columns)
        result["grid"] = str(grid)
    console.result(result, str(out))


def _settings(preset: SampleSettings, given: dict[str, float]) -> SampleSettings:
    try:
        return SampleSettings.model_validate({**preset.model_dump(), **given})
    except ValidationError as error:
        raise BadRequestError(explain(error, "sample")) from None


def file_name(index: int) -> str:
    """The file of image i."""
    return f"{index:06d}.png"


def _describe(prior: Prior, n: int, seed: int, ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    for index in range(n):
        label = prior.classes[ids[index % len(ids)]] if ids else None
        yield {"file": file_name(index), "seed": seed + index, "class": label}


def _begin(out: Path, settings: dict[str, Any], images: Iterator[dict[str, Any]]) -> None:
    """Write the manifest first: it says what the folder will hold, and whether another run may go on in it.

    Raises:
        BadRequestError: The folder holds samples of other settings, or something else.
    """
    manifest = {"settings": settings, "images": list(images)}
    path = out / MANIFEST
    if path.exists():
        _check_same(path, manifest)
    elif out.is_dir() and any(out.glob("*.png")):
        raise BadRequestError(f"{out} holds images that `movq sample` did not make", "Name another folder.")
    atomic_write(path, json.dumps(manifest, indent=1).encode())


def _check_same(path: Path, manifest: dict[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        settings, images = before["settings"], before["images"]
    except (ValueError, KeyError, TypeError):
        raise BadRequestError(f"{path} is not a manifest of `movq sample`", "Name another folder.") from None
    shared = min(len(images), len(manifest["images"]))
    if settings != manifest["settings"]:
        changed = [name for name, value in manifest["settings"].items() if settings.get(name) != value]
        raise BadRequestError(
            f"{path.parent} holds samples of other settings ({', '.join(changed) or 'more of them'})",
            "Name another folder, or remove this one.",
        )
    if images[:shared] != manifest["images"][:shared]:
        raise BadRequestError(
            f"{path.parent} holds samples of other classes", "Name another folder, or remove this one."
        )


def _write(path: Path, image: Tensor) -> None:
    atomic_write(path, encode_png(pixels.to_image(image)))


def _save_grid(path: Path, files: Sequence[Path], columns: int) -> None:
    images = [pixels.from_array(np.asarray(decode(file.read_bytes()))) for file in files]
    pixels.save_grid(path, torch.stack(images), columns, pixels.grid_scale(images[0].shape[-1]))
