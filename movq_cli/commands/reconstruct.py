"""`movq reconstruct`: encodes and decodes images with a tokenizer, or decodes code maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from movq_cli import checkpoints, devices, runs
from movq_cli.commands.code_maps import decode_maps, encode_map, find_maps
from movq_cli.console import Console, Progress
from movq_cli.data import frames, grids, pixels
from movq_cli.data.coding import ImageMemoryError, decode_batch, encode_batch, naming_images
from movq_cli.data.images import BadImageError, ImageOutOfMemoryError, covering_crop, decode, encode_png
from movq_cli.data.shards import SplitName
from movq_cli.data.spacing import evenly_spaced
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.evaluation import extractors, paired
from movq_cli.evaluation.metrics import load_scorers
from movq_cli.files import atomic_write
from movq_cli.image_size import Resolution
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.paths import is_too_long
from movq_cli.sources import stream
from movq_cli.sources.open import open_source
from movq_cli.sources.original_names import original_names
from movq_cli.sources.outputs import protect_source
from movq_cli.sources.source import Source

_GRID_COLUMNS = 16
_NAMED_UNREADABLE = 5
"""Number of unreadable images that the warning names."""


@dataclass(frozen=True)
class ReconstructRequest:
    """The options of `movq reconstruct` without a mask."""

    source: str
    """Images: a folder, archive, image, prepared set or name of a data set; or a folder of code maps."""
    out: Path
    """Folder for the PNG files."""
    run: Path | None
    """Run folder or weight file of the tokenizer; None = the newest finished run."""
    split: SplitName | None
    """Split of a source that has splits; None = all images."""
    crop: Resolution | None
    """Size of the central part that is reconstructed, after an image has been resized to the smallest size that covers
    it; None = images as they are."""
    batch_size: int
    """Number of images in a batch."""
    grid: Path | None
    """Picture to write: evenly spaced originals, above their reconstructions; None = no picture."""
    metrics: bool
    """Whether to compute mean PSNR and SSIM, and LPIPS if its weights are available."""
    source_names: bool
    """Name the images of a prepared set as in the source from which it was made."""
    codes: Path | None
    """Folder for the code map of each image, `.npy` files, uint16 [h, w, c]; None = no code maps."""
    weights: Path | None
    """Folder of LPIPS's weights; None = the folder of torch.hub."""
    device_name: str | None
    """Name of the device; None = CUDA if it is available, else the CPU."""
    requires_batches: bool = False
    """Whether it is an error that code maps are decoded one by one, because the user has named a batch size."""


def reconstruct(request: ReconstructRequest, console: Console) -> None:
    """Write the reconstruction of each image as a PNG file of the same size and name, or decode a folder of code maps.

    Args:
        request: Options of the command.
        console: Console for the progress and the result.

    Raises:
        BadRequestError: There is no usable image, or a file is not a code map of this tokenizer.
        FailureError: The memory does not suffice for some of the images; the others are written.
    """
    folder = Path(request.source)
    maps = find_maps(folder)
    if maps:
        _refuse_options_of_images(request)
    images = None if maps else open_source(request.source, request.split)
    names = [] if images is None else _output_names(images, request)
    tokenizer = runs.find_weights(request.run, "vq")
    console.log(f"tokenizer: {tokenizer}")
    device = devices.select(request.device_name)
    model = checkpoints.load_tokenizer(tokenizer).to(device)
    if images is None:
        decode_maps(model, folder, maps, request.out, console)
    else:
        for warning in images.warnings:
            console.warn(warning)
        _reconstruct_images(model, images, names, request, device, console)


def _refuse_options_of_images(request: ReconstructRequest) -> None:
    """Refuse the options that have no effect on code maps.

    Raises:
        BadRequestError: One of them is given.
    """
    options = {
        "--batch-size": request.requires_batches,
        "--split": request.split,
        "--crop": request.crop,
        "--grid": request.grid,
        "--metrics": request.metrics,
        "--codes": request.codes,
        "--source-names": request.source_names,
    }
    for name, value in options.items():
        if value:
            raise BadRequestError(
                f"{name} has no effect: {request.source} is a folder of code maps", f"Leave {name} out."
            )


def _reconstruct_images(
    model: Tokenizer,
    images: Source,
    names: Sequence[str],
    request: ReconstructRequest,
    device: torch.device,
    console: Console,
) -> None:
    metrics = _load_metrics(request.weights, device, console) if request.metrics else []
    values: dict[str, list[float]] = {metric.key: [] for metric in metrics}
    fitting = [index for index, name in enumerate(names) if not is_too_long(name)]
    unreadable = [
        f"{images.names[index]} (its name is too long)" for index, name in enumerate(names) if is_too_long(name)
    ]
    too_large: list[str] = []
    several: list[str] = []
    pairs: dict[int, Tensor] = dict.fromkeys(evenly_spaced(len(images), _GRID_COLUMNS), torch.empty(0))
    with console.progress(len(images), "reconstructing", "images") as progress:
        for indices, originals in stream.same_size_batches(
            _decode_readable(images, fitting, request.crop, unreadable, too_large, several, progress),
            request.batch_size,
        ):
            for part in _parts_in_memory(model, images, indices, originals, metrics, device, too_large):
                for key, new in part.values.items():
                    values[key] += new
                _write_batch([names[index] for index in part.indices], part.outputs, part.codes, request)
                for index, *pair in zip(part.indices, part.originals, part.outputs, strict=True):
                    if index in pairs:
                        pairs[index] = torch.stack(pair)
    if several:
        console.warn(frames.first_only_warning(several))
    unreadable += too_large
    if unreadable:
        console.warn(skipped_warning(unreadable))
    if len(unreadable) == len(images):
        raise BadRequestError(f"no usable image in {request.source}: {unreadable[0]}")
    result: dict[str, object] = {"path": str(request.out), "images": len(images) - len(unreadable)}
    result["skipped"] = len(unreadable)
    if request.codes is not None:
        result["codes"] = str(request.codes)
    if request.grid is not None:
        _save_pairs(request.grid, [pair for pair in pairs.values() if len(pair)])
        result["grid"] = str(request.grid)
    for metric in metrics:
        result[metric.key] = paired.finite_mean(torch.tensor(values[metric.key], dtype=torch.float64))
        console.log(f"{metric.key}: {result[metric.key]} ({metric.variant}; {len(values[metric.key])} images)")
    console.result(result, str(request.out))
    refuse_too_large(too_large, len(images), "Reconstruct them with --crop, or resize them.")


def skipped_warning(images: Sequence[str]) -> str:
    """Return the sentence about images that were left out; each is given with its reason."""
    more = " ..." if len(images) > _NAMED_UNREADABLE else ""
    return f"{len(images)} images were skipped: {'; '.join(images[:_NAMED_UNREADABLE])}{more}"


def refuse_too_large(images: Sequence[str], total: int, remedy: str) -> None:
    """Raise the error about images that were left out for lack of memory, after all others have been written.

    Args:
        images: Sentences about these images; if there are none, nothing is raised.
        total: Number of all images.
        remedy: What to do about them.

    Raises:
        FailureError: There are such images.
    """
    if images:
        raise FailureError(
            f"{len(images)} of {total} images were left out, because the memory does not suffice for them: "
            f"{', '.join(images[:_NAMED_UNREADABLE])}",
            remedy,
        )


class _Part(NamedTuple):
    """Images of one size with their reconstructions, on the CPU."""

    indices: list[int]
    originals: Tensor  # [B, 3, H, W] uint8
    outputs: Tensor  # [B, 3, H, W] uint8
    codes: Tensor  # [B, h, w, c]
    values: dict[str, list[float]]
    """Value of each metric for each image."""


def _parts_in_memory(
    model: Tokenizer,
    images: Source,
    indices: Tensor,
    originals: Tensor,
    metrics: Sequence[paired.PairScorer],
    device: torch.device,
    too_large: list[str],
) -> Iterator[_Part]:
    """Yield the reconstructions of a batch: at once, or one by one if the memory does not suffice for all.

    Args:
        model: Tokenizer.
        images: Source of the images, for their names.
        indices: Indices [B] of the images.
        originals: Images [B, 3, H, W] uint8 on the CPU.
        metrics: Metrics to compute.
        device: Device of the tokenizer.
        too_large: List to which an image is appended for which the memory does not suffice.
    """
    names = [images.names[index] for index in indices.tolist()]
    try:
        yield _reconstruct_part(model, names, indices, originals, metrics, device)
        return
    except ImageMemoryError as error:
        if len(indices) == 1:
            too_large.append(error.message)
            return
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for index, original in zip(indices.split(1), originals.split(1), strict=True):
        yield from _parts_in_memory(model, images, index, original, metrics, device, too_large)


def _reconstruct_part(
    model: Tokenizer,
    names: Sequence[str],
    indices: Tensor,
    originals: Tensor,
    metrics: Sequence[paired.PairScorer],
    device: torch.device,
) -> _Part:
    """Reconstruct images of one size at once; the arguments are those of `_parts_in_memory`.

    Raises:
        ImageMemoryError: The memory does not suffice.
    """
    size = originals.shape[-2:]
    with naming_images(names, size):
        inputs = originals.to(device)
        codes = encode_batch(model, inputs)
        outputs = decode_batch(model, codes, size)
        values = paired.score_pairs(metrics, [(indices, torch.stack([inputs, outputs], 1))], device)
        return _Part(indices.tolist(), originals, outputs.cpu(), codes.cpu(), values)


def _output_names(images: Source, request: ReconstructRequest) -> list[str]:
    """Return the name of the PNG file of each image.

    Raises:
        BadRequestError: The output would replace images, or be read as images of the source later.
    """
    stored = images.names
    names = output_names(original_names(Path(request.source), stored) if request.source_names else stored)
    files = [request.out / name for name in names]
    folders = [request.out]
    if request.codes is not None:
        folders.append(request.codes)
        files += [_codes_path(request.codes, name) for name in names]
    protect_source(images, folders, files, pictures=[] if request.grid is None else [request.grid])
    return names


def _codes_path(folder: Path, name: str) -> Path:
    return (folder / name).with_suffix(".npy")


def _write_batch(names: Sequence[str], images: Tensor, codes: Tensor, request: ReconstructRequest) -> None:
    for name, image, code_map in zip(names, images, codes, strict=True):
        atomic_write(request.out / name, encode_png(pixels.to_image(image)))
        if request.codes is not None:
            atomic_write(_codes_path(request.codes, name), encode_map(code_map))


def _load_metrics(weights: Path | None, device: torch.device, console: Console) -> list[paired.PairScorer]:
    """Return PSNR, SSIM, and LPIPS if its weights are on this machine; this command downloads nothing."""
    keys = {"psnr", "ssim"}
    if extractors.available_trunks(weights):
        keys.add("lpips")
    else:
        console.log("lpips: left out, because its weights are not available (`movq weights --fetch` downloads them)")
    return load_scorers(keys, weights, device)


def _decode_readable(
    images: Source,
    indices: Sequence[int],
    crop: Resolution | None,
    unreadable: list[str],
    too_large: list[str],
    several: list[str],
    progress: Progress,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the index and pixels of each readable image.

    Args:
        images: The images.
        indices: Indices of the images that are read.
        crop: Size of the central part; None = images as they are.
        unreadable: List to which each image is appended that cannot be read, with the reason.
        too_large: List to which each image is appended for which the memory does not suffice.
        several: List to which the name of each image is appended whose file holds further pages or frames.
        progress: Progress, which counts all images.
    """
    for index, image in stream.mapped(images, indices, partial(_decode, crop=crop)):
        progress.advance()
        if isinstance(image, ImageOutOfMemoryError):
            too_large.append(f"{image} at {images.names[index]}")
        elif isinstance(image, BadImageError):
            unreadable.append(f"{images.names[index]} ({image})")
        else:
            if image.has_several:
                several.append(images.names[index])
            yield index, image.pixels


class _Decoded(NamedTuple):
    """An image that was read."""

    pixels: Tensor  # [3, H, W] uint8
    has_several: bool  # whether its file holds further pages or frames


def _decode(data: bytes, crop: Resolution | None) -> _Decoded:
    image = decode(data)
    array = np.asarray(image if crop is None else covering_crop(image, crop))
    return _Decoded(pixels.from_array(array), frames.has_several(data))


def output_names(names: Sequence[str]) -> list[str]:
    """Return a PNG file name for each image: `.png` replaces the suffix, or is appended if two names would be equal."""
    return [f"{name}.png" for name in paired.short_names(names)]


def _save_pairs(path: Path, pairs: list[Tensor]) -> None:
    """Write a grid of originals, reconstructions and errors, with the pairs that have the size of the first pair."""
    same = [pair for pair in pairs if pair.shape == pairs[0].shape]
    originals, reconstructed = (torch.stack([pair[row] for pair in same]) for row in (0, 1))
    grids.save(path, grids.with_errors(originals, reconstructed), len(same), rows=grids.ROWS)
