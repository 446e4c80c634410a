"""`movq sample`: draws images from a prior, with a manifest from which each image can be drawn again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from movq_cli import agreement, devices, runs, signals
from movq_cli.api import Prior
from movq_cli.console import Console
from movq_cli.data import grids, pixels, tuned_settings
from movq_cli.data.images import decode
from movq_cli.data.output_files import PICTURE, refuse_foreign
from movq_cli.data.sample_files import SampleFiles, SampleManifest, image_name
from movq_cli.errors import BadRequestError
from movq_cli.files import sha256
from movq_cli.launcher import joined_ranks, launch, starts_processes
from movq_cli.presets import explain
from movq_cli.ranks import Ranks
from movq_cli.settings import SampleSettings
from movq_cli.sources.open import open_source
from movq_cli.sources.outputs import refuse_collisions
from movq_cli.version import __version__

_GRID_IMAGES = 100
_GRID_COLUMNS = 10
_COMPILED_FROM = 10_000
"""Number of images from which compiled blocks are worth the seconds of compilation; CUDA only."""
_OMITTED_AT_DEFAULT = ("order", "mask_schedule", "guidance_power", "guidance_interval")
"""Settings that a manifest omits at their default, so that sample folders from before these settings can be resumed."""


@dataclass(frozen=True)
class SampleRequest:
    """The options of `movq sample`."""

    out: Path
    """Folder for the PNG files, or a .zip file of them, or an .npz file of their pixels."""
    n: int
    """Number of images."""
    seed: int
    """Random seed of image 0; the seed of image i is this plus i."""
    classes: Sequence[str]
    """Names or indices of classes, which the images take in turn; empty = all classes."""
    run: Path | None
    """Run folder or weight file of the prior; None = the newest finished run."""
    tokenizer: Path | None
    """Run folder or weight file of the tokenizer; None = the one in the prior's folder."""
    settings: Mapping[str, Any]
    """Values of `SampleSettings` that replace those of the preset, by name."""
    batch_size: int
    """Number of images in a batch, on each GPU."""
    grid: Path | None
    """Picture to write, a grid of the first hundred images; None = no picture."""
    device_name: str | None
    """Name of the device; None = CUDA if it is available, else the CPU."""
    gpus: int | None
    """Number of processes to start, one for each GPU; None = this process, or those that torchrun has started."""
    preset_settings: bool = False
    """Whether the settings that `movq sample --tune` found are ignored."""


def sample(request: SampleRequest, *, arguments: Sequence[str], console: Console) -> None:
    """Draw the images 0 to n - 1 and write them; images that an interrupted run has written are kept.

    Args:
        request: Options of the command.
        arguments: Arguments of the command line, with which further processes are started.
        console: Console for the progress and the result.

    Raises:
        BadRequestError: The prior does not have these settings or classes, `out` holds something else, or the picture
            would replace one of the images or a file that movq did not write.
        FailureError: A file cannot be written.
        InterruptedRunError: The process received one of `signals.STOP_SIGNALS`; the images made so far are kept.
    """
    if request.grid is not None:
        refuse_foreign(request.grid, PICTURE)
        refuse_collisions([request.out / image_name(index) for index in range(request.n)], [request.grid])
    if starts_processes(request.gpus):
        assert request.gpus is not None
        runs.find_weights(request.run, "prior")  # A bad request is refused before any process is started.
        launch(arguments, request.gpus, request.device_name)
        return
    with (
        joined_ranks(request.device_name) as (ranks, device),
        signals.interruptible("the images made", launched=ranks.world_size > 1),
        ranks.long_barrier() as barrier,  # packing many images may take longer than the usual timeout of a barrier
    ):
        agreement.require_shared(ranks, request.out)
        weights = ranks.from_first(lambda: runs.find_weights(request.run, "prior"))
        console.log(f"prior: {weights}")
        prior = load_prior(weights, request, device)
        digest = ranks.from_first(lambda: sha256(weights))
        tuned = ranks.from_first(lambda: _find_tuned(prior, weights, digest, request, console))
        settings = merge_settings(prior, request.settings, tuned)
        _warn_of_guidance(settings, weights, console)
        class_ids = prior.class_ids(request.classes)
        target = SampleFiles(request.out, _manifest(prior, settings, digest, request, class_ids))
        images = {"the number of images": request.n, "the classes of the images": class_ids}
        agreement.require_same(ranks, {**target.manifest.settings, **images})
        made = 0
        if ranks.from_first(target.is_finished):
            console.log(f"{request.out} is already finished ({request.n} images)")
        else:
            with target.locked() if ranks.is_first else nullcontext():
                missing = ranks.from_first(partial(target.begin, console))
                made = len(missing)
                draw = partial(prior.sample, seed=request.seed, classes=class_ids, settings=settings)
                # On CUDA, results are rounded differently in batches of another size: the last batch is padded.
                padded_size = min(request.batch_size, request.n) if device.type == "cuda" else 1
                _draw_missing(draw, missing, target, request.batch_size, padded_size, ranks, barrier, console)
                if ranks.is_first:
                    labels = [class_ids[index % len(class_ids)] for index in range(request.n)] if class_ids else []
                    target.finish(labels, console)
                barrier()
        if ranks.is_first:
            _report(request, target, made, prior, class_ids, console)


def load_prior(weights: Path, request: SampleRequest, device: torch.device) -> Prior:
    """Load the prior and its tokenizer on a device, in the precision and the memory format that are fastest there."""
    prior = Prior.load(weights, request.tokenizer).to(device)
    devices.cast_linear_layers(prior.transformer, device, "auto")
    if device.type == "cuda":
        prior.tokenizer.to(memory_format=torch.channels_last)
        if request.n >= _COMPILED_FROM:
            prior.transformer.compile_blocks()
    return prior


def _find_tuned(prior: Prior, weights: Path, digest: str, request: SampleRequest, console: Console) -> dict[str, Any]:
    """Return the settings that `movq sample --tune` found for a weight file and that the user did not give."""
    found = None if request.preset_settings else tuned_settings.find(weights, digest, console)
    if found is None:
        return {}
    path, base = tuned_settings.path_beside(weights), {**prior.header.sample.model_dump(), **request.settings}
    if {name: base[name] for name in found.fixed} != found.fixed:
        console.log(f"{path} is not used: it was found with {_listed(found.fixed)}")
        return {}
    tuned = {name: value for name, value in found.best.items() if name not in request.settings}
    if tuned:
        goal = "" if found.min_recall is None else f" for {found.goal}"
        console.log(f"tuned settings{goal}: {_listed(tuned)} (from {path}; --preset-settings ignores them)")
    return tuned


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {'all' if value is None else value}" for name, value in settings.items())


def merge_settings(prior: Prior, values: Mapping[str, Any], tuned: Mapping[str, Any]) -> SampleSettings:
    """Return the settings of sampling, after a check that the prior has them.

    Args:
        prior: The prior, whose preset gives the settings that nothing else does.
        values: Values of the command line, by name.
        tuned: Values of a search, by name, which those of the command line replace.

    Raises:
        BadRequestError: The prior does not have a setting of the command line, or cannot use a value.
    """
    for name in values:
        if name in prior.transformer.unused_sample_settings:
            option = f"--{name.replace('_', '-')}"
            raise BadRequestError(
                f"{option} has no meaning for this prior (mode {prior.header.prior.mode}), "
                f"which {prior.transformer.decoding}",
                f"Leave {option} out.",
            )
    try:
        settings = SampleSettings.model_validate({**prior.header.sample.model_dump(), **tuned, **values})
    except ValidationError as error:
        raise BadRequestError(explain(error, "sample")) from None
    prior.transformer.check_sample_settings(settings)
    for name in ("guidance_schedule", "guidance_power", "guidance_interval"):
        if name in values and not settings.guidance:
            option = f"--{name.replace('_', '-')}"
            raise BadRequestError(f"{option} has no effect without guidance", "Give --guidance, or leave it out.")
    if "guidance_power" in values and settings.guidance_schedule != "power-cosine":
        raise BadRequestError(
            f"--guidance-power has no effect with a {settings.guidance_schedule} guidance",
            "Give --guidance-schedule power-cosine, or leave it out.",
        )
    if "choice_temperature" in values and settings.order in {"halton", "random"}:
        raise BadRequestError(
            f"--choice-temperature has no effect on the order {settings.order}, which does not depend on confidences",
            "Give --order confidence, or leave it out.",
        )
    if settings.guidance > 0 and not prior.classes:
        raise BadRequestError("guidance needs a class-conditional prior, and this one is unconditional")
    return settings


def _warn_of_guidance(settings: SampleSettings, weights: Path, console: Console) -> None:
    """Warn of guidance if the run folder of the weights says that no image was trained without its class."""
    if not settings.guidance:
        return
    try:
        trained = runs.Run(weights.parent, "prior").read().settings.train_prior
    except BadRequestError:  # The weights alone are enough to sample.
        return
    if trained.label_dropout == 0:
        console.warn(
            "this prior was trained without label dropout, so guidance has no useful effect: sample with --guidance 0, "
            "or train a prior with -o train_prior.label_dropout=0.1"
        )


def _manifest(
    prior: Prior, settings: SampleSettings, weights: str, request: SampleRequest, class_ids: Sequence[int]
) -> SampleManifest:
    """Return the manifest of the samples.

    Args:
        prior: Prior from which the samples are drawn.
        settings: Settings of sampling.
        weights: SHA-256 of the prior's weight file.
        request: Options of the command.
        class_ids: Indices of the classes that the images take in turn; empty for an unconditional prior.
    """
    header, default = prior.header, SampleSettings()
    used = {
        name: value
        for name, value in settings.model_dump().items()
        if name not in prior.transformer.unused_sample_settings
        and not (name in _OMITTED_AT_DEFAULT and value == getattr(default, name))
    }
    entries = {"seed": request.seed, "mode": header.prior.mode} | prior.transformer.manifest_entries(settings)
    return SampleManifest(
        settings={**used, **entries, "prior": weights, "tokenizer": header.tokenizer},
        made_with={
            "movq": __version__,
            "torch": torch.__version__,
            "device": prior.transformer.position.device.type,
        },
        images=[
            {
                "file": image_name(index),
                "seed": request.seed + index,
                "class": prior.classes[class_ids[index % len(class_ids)]] if class_ids else None,
            }
            for index in range(request.n)
        ],
    )


def _draw_missing(
    draw: Callable[..., Tensor],
    missing: Sequence[int],
    target: SampleFiles,
    batch_size: int,
    padded_size: int,
    ranks: Ranks,
    barrier: Callable[[], None],
    console: Console,
) -> None:
    """Draw and write this rank's share of the missing images, and wait for the other ranks.

    Args:
        draw: Function that returns the images of the given `indices`.
        missing: Indices of the missing images, of all ranks.
        target: Set of samples on disk.
        batch_size: Number of images in a batch.
        padded_size: Number of images to which a smaller batch is padded; the padding is not written.
        ranks: Ranks that share the work.
        barrier: Function that waits for all ranks.
        console: Console for the progress.
    """
    images = target.manifest.images
    done = len(images) - len(missing)
    if done:
        console.log(f"{done} of {len(images)} images are already in {target.folder}")
    share = missing[ranks.share(len(missing))]
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    counter = ranks.shared_counter()

    def draw_batch(indices: Sequence[int]) -> Tensor:
        padding = range(len(images), len(images) + padded_size - len(indices))
        return pixels.to_bytes(draw(indices=[*indices, *padding]))

    with (
        console.progress(len(images), "sampling", "images", done=done) as progress,
        ThreadPoolExecutor() as encoders,
    ):
        writes: list[Future[None]] = []
        for indices, batch in zip(batches, devices.copied_to_cpu(map(draw_batch, batches)), strict=True):
            _wait_for(writes)  # one batch is encoded while the next one is drawn, so that memory is bounded
            writes = [
                encoders.submit(_write, target, index, image)
                for index, image in zip(indices, batch, strict=False)  # without the padding
            ]
            progress.advance(counter.add(len(indices)))
        _wait_for(writes)
        barrier()
        progress.advance(counter.add(0))


def _wait_for(writes: Sequence[Future[None]]) -> None:
    for write in writes:
        write.result()


def _write(target: SampleFiles, index: int, image: Tensor) -> None:
    target.write_image(index, pixels.to_image(image))


def _report(
    request: SampleRequest, target: SampleFiles, made: int, prior: Prior, class_ids: Sequence[int], console: Console
) -> None:
    result: dict[str, object] = {"path": str(request.out), "images": target.listed, "made": made}
    if request.grid is not None:
        _save_grid(request.grid, request, target.manifest, [prior.classes[index] for index in class_ids])
        result["grid"] = str(request.grid)
    console.result(result, str(request.out))


def _save_grid(path: Path, request: SampleRequest, manifest: SampleManifest, classes: Sequence[str]) -> None:
    """Write the first hundred images, in columns by class if there are few classes.

    Args:
        path: Path of the picture.
        request: Options of the command.
        manifest: Description of the images.
        classes: Names of the classes that the images take in turn; empty for an unconditional prior.
    """
    source = open_source(str(request.out))
    positions = {name: index for index, name in enumerate(source.names)}
    count = min(request.n, _GRID_IMAGES)
    images = np.stack([np.asarray(decode(source.read(positions[image_name(index)]))) for index in range(count)])
    settings = manifest.settings
    words = [
        f"mode {settings['mode']}",
        *([f"{settings['steps']} steps"] if "steps" in settings else []),
        *([f"guidance {settings['guidance']:g}"] if settings["guidance"] else []),
        *([f"class {classes[0]}"] if len(classes) == 1 else []),
        f"seed {request.seed}",
    ]
    has_columns = 1 < len(classes) <= _GRID_COLUMNS
    grids.save(
        path,
        images,
        len(classes) if has_columns else _GRID_COLUMNS,
        title=", ".join(words),
        headings=classes if has_columns else (),
        captions=[str(image["class"]) for image in manifest.images[:count]] if len(classes) > _GRID_COLUMNS else (),
    )
