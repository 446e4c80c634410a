"""`movq sample`: draw images from a prior, with a manifest that says how to draw each again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from movq_cli import devices, ranks, runs, signals
from movq_cli.api import Prior
from movq_cli.console import Console
from movq_cli.data import pixels
from movq_cli.data.images import decode, encode_png
from movq_cli.data.sample_files import SampleFiles, SampleManifest, image_name
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write, sha256
from movq_cli.presets import explain
from movq_cli.ranks import Ranks
from movq_cli.settings import SampleSettings
from movq_cli.sources.open import open_source
from movq_cli.version import __version__

_GRID_IMAGES = 100
_GRID_COLUMNS = 10
_COMPILED_FROM = 10_000
"""Images from which compiled blocks are worth the seconds that compiling takes; CUDA."""
_OMITTED_AT_DEFAULT = ("order",)
"""Settings that a manifest omits at their default, so that sample folders from before these settings can be resumed."""


def sample(
    out: Path,
    *,
    n: int,
    run: Path | None,
    tokenizer: Path | None,
    seed: int,
    classes: Sequence[str],
    asked: Mapping[str, Any],
    batch_size: int,
    grid: Path | None,
    device: str | None,
    gpus: int | None,
    console: Console,
) -> None:
    """Draw images 0 to n - 1; what an interrupted run has made already is kept.

    Args:
        out: Folder of the PNGs, or a .zip of them, or an .npz of their pixels.
        n: Images.
        run: Prior's run folder or weight file; None = the newest finished run.
        tokenizer: Run folder or weight file; None = the one beside the prior.
        seed: Of image 0; image i has seed + i.
        classes: Names or numbers, taken in turn; empty = all.
        asked: Settings of the sampler by name; None = the preset's.
        batch_size: Images at once, on each GPU.
        grid: Picture of the first hundred.
        device: Name; None = CUDA where there is one.
        gpus: Processes to start, one a GPU; None = this one alone, or those that torchrun has started.
        console: Where to speak.

    Raises:
        BadRequestError: Settings or classes that this prior has not, or `out` holds something else.
        FailureError: A file cannot be written.
        InterruptedRunError: Ctrl-C or SIGTERM; the images made so far are kept.
    """
    weights = runs.find_weights(run, "prior")
    if gpus is not None and not ranks.is_launched():
        ranks.launch(sys.argv[1:], gpus, device)
        return
    with (
        ranks.joined_ranks(device) as (mine, where),
        signals.interruptible("the images made", launched=mine.world_size > 1),
        mine.long_barrier() as barrier,  # to pack many images may take longer than the others would wait
    ):
        console.log(f"prior: {weights}")
        prior = Prior.load(weights, tokenizer).to(where)
        devices.cast_linear_layers(prior.transformer, where, "auto")
        if where.type == "cuda":
            prior.tokenizer.to(memory_format=torch.channels_last)
            if n >= _COMPILED_FROM:
                prior.transformer.compile_blocks()
        settings = _settings(prior, asked)
        ids = prior.class_ids(classes)
        target = SampleFiles(out, _manifest(prior, settings, sha256(weights), n, seed, ids))
        made = 0
        if mine.from_first(target.is_finished):
            console.log(f"{out} is finished already ({n} images); nothing to do")
        else:
            with target.locked() if mine.is_first else nullcontext():
                missing = mine.from_first(target.begin)
                made = len(missing)
                draw = partial(prior.sample, seed=seed, classes=ids, settings=settings)
                # A batch of another size is rounded otherwise there: the last one is filled up.
                whole = min(batch_size, n) if where.type == "cuda" else 1
                _make(draw, missing, target, batch_size, whole, mine, barrier, console)
                if mine.is_first:
                    target.finish([ids[index % len(ids)] for index in range(n)] if ids else [], console)
                barrier()
        if mine.is_first:
            _report(out, n, made, grid, ids, console)


def _settings(prior: Prior, asked: Mapping[str, Any]) -> SampleSettings:
    """The preset's settings with those asked for, which must mean something to the prior."""
    given = {name: value for name, value in asked.items() if value is not None}
    for name in given:
        if name in prior.transformer.unused_sample_settings:
            option = f"--{name.replace('_', '-')}"
            this_prior = f"this prior (mode {prior.header.prior.mode})"
            raise BadRequestError(f"{this_prior} {prior.transformer.decoding}", f"Leave {option} out.")
    try:
        settings = SampleSettings.model_validate({**prior.header.sample.model_dump(), **given})
    except ValidationError as error:
        raise BadRequestError(explain(error, "sample")) from None
    prior.transformer.check_sample_settings(settings)
    if settings.guidance > 0 and not prior.classes:
        raise BadRequestError("guidance needs a class-conditional prior, and this one is unconditional")
    return settings


def _manifest(
    prior: Prior, settings: SampleSettings, weights: str, n: int, seed: int, ids: Sequence[int]
) -> SampleManifest:
    header, device = prior.header, prior.transformer.position.device
    default = SampleSettings()
    used = {
        name: value
        for name, value in settings.model_dump().items()
        if name not in prior.transformer.unused_sample_settings
        and not (name in _OMITTED_AT_DEFAULT and value == getattr(default, name))
    }
    entries = {"seed": seed, "mode": header.prior.mode} | prior.transformer.manifest_entries(settings)
    return SampleManifest(
        settings={**used, **entries, "prior": weights, "tokenizer": header.tokenizer},
        made_with={"movq": __version__, "torch": torch.__version__, "device": device.type},
        images=[
            {
                "file": image_name(index),
                "seed": seed + index,
                "class": prior.classes[ids[index % len(ids)]] if ids else None,
            }
            for index in range(n)
        ],
    )


def _make(
    draw: Callable[..., Tensor],
    missing: Sequence[int],
    target: SampleFiles,
    batch_size: int,
    whole: int,
    mine: Ranks,
    barrier: Callable[[], None],
    console: Console,
) -> None:
    """Write this rank's share of the images that are missing, in batches of `whole` at least; wait for the others'."""
    images = target.manifest.images
    there = len(images) - len(missing)
    if there:
        console.log(f"{there} of {len(images)} images are in {target.folder} already")
    share = missing[mine.share(len(missing))]
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    counter = mine.shared_counter()

    def drawn(indices: Sequence[int]) -> Tensor:
        fill = range(len(images), len(images) + whole - len(indices))
        return pixels.to_bytes(draw(indices=[*indices, *fill]))

    with (
        console.progress(len(images), "sampling", "images", done=there) as progress,
        ThreadPoolExecutor() as encoders,
    ):
        writing: list[Future[None]] = []
        for indices, batch in zip(batches, devices.copied_to_cpu(map(drawn, batches)), strict=True):
            _settle(writing)  # one batch is encoded while the next is drawn: memory stays bounded
            writing = [
                encoders.submit(_write, target.folder / images[index]["file"], image)
                for index, image in zip(indices, batch, strict=False)  # without those that fill it
            ]
            progress.advance(counter.add(len(indices)))
        _settle(writing)
        barrier()
        progress.advance(counter.add(0))


def _settle(writing: Sequence[Future[None]]) -> None:
    for written in writing:
        written.result()


def _write(path: Path, image: Tensor) -> None:
    atomic_write(path, encode_png(pixels.to_image(image)))


def _report(out: Path, n: int, made: int, grid: Path | None, ids: Sequence[int], console: Console) -> None:
    result = {"path": str(out), "images": n, "made": made}
    if grid is not None:
        _save_grid(grid, out, n, len(ids) if 1 < len(ids) <= _GRID_COLUMNS else _GRID_COLUMNS)
        result["grid"] = str(grid)
    console.result(result, str(out))


def _save_grid(path: Path, out: Path, n: int, columns: int) -> None:
    source = open_source(str(out))
    place = {name: index for index, name in enumerate(source.names)}
    files = [source.read(place[image_name(index)]) for index in range(min(n, _GRID_IMAGES))]
    images = [pixels.from_array(np.asarray(decode(file))) for file in files]
    pixels.save_grid(path, torch.stack(images), columns, pixels.grid_scale(images[0].shape[-1]))
