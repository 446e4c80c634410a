"""`movq reconstruct` with a mask: a masked prior fills in hidden codes (appendix A of the paper, and in-painting)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from movq_cli import devices, runs
from movq_cli.api import Prior
from movq_cli.commands.reconstruct import refuse_too_large, skipped_warning
from movq_cli.console import Console
from movq_cli.data import frames, grids, pixels
from movq_cli.data.images import WHITE, BadImageError, center_crop, decode, encode_png, resize_to_cover
from movq_cli.data.shards import SplitName
from movq_cli.data.spacing import evenly_spaced
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import paired
from movq_cli.files import atomic_write
from movq_cli.image_size import ImageSize
from movq_cli.models.masked_prior import ratio_mask
from movq_cli.paths import is_too_long
from movq_cli.settings import SampleSettings
from movq_cli.sources.open import open_source
from movq_cli.sources.outputs import protect_source
from movq_cli.sources.source import Source

FIGURE_RATIOS = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2)
"""Mask ratios of the columns of the picture after figure A.1."""

_FIGURE_IMAGES = 4
_WHITE_FROM = 128
"""Grey value, of 255, from which a pixel of the mask counts as white."""

_BLACK = (0, 0, 0)

_TOP1 = SampleSettings(steps=1, top_k=1)
"""Settings that fill in the most likely code at each hidden position, all in one step."""


@dataclass(frozen=True)
class FillRequest:
    """The options of `movq reconstruct` with a mask."""

    source: str
    """Images: a folder, archive, image, prepared set or name of a data set."""
    out: Path
    """Folder for the PNG files; with several samples of an image, NAME-0.png, NAME-1.png ..."""
    prior: Path | None
    """Run folder or weight file of a masked prior; None = the newest finished run."""
    split: SplitName | None
    """Split of a source that has splits; None = all images."""
    ratio: float | None
    """Share of the codes to hide, in [0, 1]; None = the codes under the white pixels of `picture`."""
    picture: Path | None
    """Mask whose white pixels are filled in; None = hide codes by `ratio`."""
    top1: bool
    """Whether to fill in the most likely codes in one step, instead of drawing them."""
    samples: int
    """Number of fillings to draw for each image."""
    steps: int | None
    """Number of decoding steps of drawn fillings; None = as the prior's settings say."""
    seed: int
    """Random seed of the first filling of the first image."""
    figure: Path | None
    """Picture to write: examples at several mask ratios (columns), most likely and drawn fillings (rows)."""
    device_name: str | None
    """Name of the device; None = CUDA if it is available, else the CPU."""


def fill(request: FillRequest, console: Console) -> None:
    """Hide a part of the codes of each image, fill it in with a masked prior, and write the decoded images.

    Images are cropped to the prior's size. With a mask ratio, all pixels are decoded; with a painted mask, the pixels
    that are not white in it remain those of the image.

    Args:
        request: Options of the command.
        console: Console for the progress and the result.

    Raises:
        BadRequestError: The prior is not a masked one, the mask cannot be read or has no white pixel, or no image can
            be read.
        FailureError: The memory does not suffice for some of the images; the others are written.
    """
    weights = runs.find_weights(request.prior, "prior")
    console.log(f"prior: {weights}")
    model = Prior.load(weights).to(devices.select(request.device_name))
    if not model.transformer.fills_hidden_codes:
        raise BadRequestError(
            f"{weights} cannot fill in hidden codes: this prior {model.transformer.decoding}",
            "Name a masked prior (movq train-prior --mode mask) with --prior.",
        )
    images = open_source(request.source, request.split)
    painted = None if request.picture is None else _read_mask(request.picture, model)
    for warning in images.warnings:
        console.warn(warning)
    outputs = _output_paths(images.names, request)
    pictures = [] if request.figure is None else [request.figure]
    files = [path for paths in outputs for path in paths]
    read = [] if request.picture is None else [request.picture]
    protect_source(images, [request.out], files, pictures=pictures, also_read=read)
    skipped: list[str] = []
    too_large: list[str] = []
    several: list[str] = []
    filled: list[int] = []
    with console.progress(len(images), "filling", "images") as progress:
        for index, original in _crop_images(images, model, skipped, too_large, several):
            progress.advance()
            paths = outputs[index]
            if any(is_too_long(str(path.relative_to(request.out))) for path in paths):
                skipped.append(f"{images.names[index]} (its name is too long)")
                continue
            for path, image in zip(paths, _fill_image(model, original, painted, request, index), strict=True):
                atomic_write(path, encode_png(pixels.to_image(image)))
            filled.append(index)
    if several:
        console.warn(frames.first_only_warning(several))
    skipped += too_large
    if skipped:
        console.warn(skipped_warning(skipped))
    if not filled:
        raise BadRequestError(f"no usable image in {request.source}: {skipped[0]}")
    result: dict[str, object] = {"path": str(request.out), "images": len(filled)}
    result |= {"skipped": len(skipped), "fillings": request.samples}
    if request.figure is not None:
        _save_figure(request.figure, request, model, images.take(filled))
        result["figure"] = str(request.figure)
    console.result(result, str(request.out))
    refuse_too_large(too_large, len(images), "Resize them.")


def _output_paths(names: Sequence[str], request: FillRequest) -> list[list[Path]]:
    """Return the files of the fillings of each image: NAME.png, or NAME-0.png, NAME-1.png ... if there are several."""
    endings = [".png"] if request.samples == 1 else [f"-{number}.png" for number in range(request.samples)]
    return [[request.out / f"{name}{ending}" for ending in endings] for name in paired.short_names(names, endings)]


def _fill_image(
    model: Prior, original: Tensor, painted: Tensor | None, request: FillRequest, index: int
) -> Sequence[Tensor]:
    """Return the fillings [3, H, W] uint8 of one image.

    Args:
        model: Masked prior with its tokenizer.
        original: Image [3, H, W] uint8.
        painted: Pixels [1, H, W] bool to fill in; None = hide codes by the ratio.
        request: Options of the command.
        index: Index of the image.
    """
    seeds = [request.seed + index * request.samples + number for number in range(request.samples)]
    if painted is None:
        assert request.ratio is not None
        hidden = ratio_mask(request.ratio, [request.seed + index], model.transformer.shape)
    else:
        hidden = _codes_under(painted, model)
    filled = _fill_codes(model, original, hidden, seeds, _sample_settings(model, request))
    return list(filled) if painted is None else [torch.where(painted, image, original) for image in filled]


@torch.inference_mode()
def _fill_codes(
    model: Prior, original: Tensor, hidden: Tensor, seeds: Sequence[int], settings: SampleSettings
) -> Tensor:
    """Return one decoded filling [3, H, W] uint8 of an image for each seed, as one tensor [len(seeds), 3, H, W].

    Args:
        model: Masked prior with its tokenizer.
        original: Image [3, H, W] uint8, whose codes remain where nothing is hidden.
        hidden: Codes [1, h, w, c] bool to fill in.
        seeds: Random seeds of the fillings.
        settings: Settings of sampling.
    """
    prior, tokenizer, device = model.transformer, model.tokenizer, model.transformer.position.device
    codes = tokenizer.encode(pixels.to_signed(original[None].to(device)))
    known = codes.masked_fill(hidden.to(device), prior.unknown).repeat(len(seeds), 1, 1, 1)
    # The class is unknown: the visible codes alone say what the image shows.
    classes = torch.full((len(seeds),), prior.no_class, device=device) if model.classes else None
    with devices.autocast(device, "auto"):
        filled = prior.decode(seeds, classes, settings, known)
    return pixels.to_bytes(tokenizer.decode(filled)).cpu()


def _sample_settings(model: Prior, request: FillRequest) -> SampleSettings:
    if request.top1:
        return _TOP1
    settings = model.header.sample.model_copy(update={"guidance": 0.0})
    return settings if request.steps is None else settings.model_copy(update={"steps": request.steps})


def _crop_images(
    images: Source, model: Prior, skipped: list[str], too_large: list[str], several: list[str]
) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of each image, and its pixels [3, H, W] uint8, cropped to the prior's size.

    Args:
        images: The images.
        model: Masked prior with its tokenizer.
        skipped: List to which the name and the error of each image are appended that cannot be read.
        too_large: List to which each image is appended for which the memory does not suffice.
        several: List to which the name of each image is appended whose file holds further pages or frames.
    """
    for index, name in enumerate(images.names):
        try:
            data = images.read(index)
            image = _read_cropped(data, model)
        except BadImageError as error:
            skipped.append(f"{name} ({error})")
        except MemoryError:
            too_large.append(f"out of memory at {name}")
        else:
            if frames.has_several(data):
                several.append(name)
            yield index, image


def _read_cropped(data: bytes, model: Prior, background: tuple[int, int, int] = WHITE) -> Tensor:
    """Return the pixels [3, H, W] uint8 of an image file, resized and cropped to the prior's size.

    Args:
        data: Bytes of the file.
        model: Masked prior with its tokenizer.
        background: Color that transparent pixels are composited over, RGB in 0..255.
    """
    shape, factor = model.transformer.shape, model.tokenizer.settings.factor
    size = ImageSize(shape.height * factor, shape.width * factor)
    image = center_crop(resize_to_cover(decode(data, background=background), size, upscale=True), size)
    return pixels.from_array(np.asarray(image))


def _read_mask(path: Path, model: Prior) -> Tensor:
    """Return which pixels [1, H, W] bool are white in a mask; transparent pixels are not.

    Raises:
        BadRequestError: It cannot be read, or has no white pixel.
    """
    try:
        white = _read_cropped(path.read_bytes(), model, _BLACK).float().mean(0, keepdim=True) >= _WHITE_FROM
    except OSError as error:
        raise BadRequestError(f"--mask {path} cannot be read: {error.strerror}") from None
    except BadImageError as error:
        raise BadRequestError(f"--mask {path} is not a picture: {error}") from None
    if not white.any():
        raise BadRequestError(
            f"--mask {path} has no white pixel, so that nothing would be filled in",
            "Paint white what is to be filled in, and the rest black.",
        )
    return white


def _codes_under(painted: Tensor, model: Prior) -> Tensor:
    """Return the codes [1, h, w, c] bool whose image area has a painted pixel; `painted` is [1, H, W] bool."""
    positions = F.max_pool2d(painted[None].float(), model.tokenizer.settings.factor)[0] > 0
    return positions[..., None].expand(-1, -1, -1, model.transformer.shape.chunks)


def _save_figure(path: Path, request: FillRequest, model: Prior, images: Source) -> None:
    """Write figure A.1: the columns are mask ratios; each image has a row of most likely fillings above drawn ones."""
    examples = images.take(evenly_spaced(len(images), _FIGURE_IMAGES))
    shape = model.transformer.shape
    methods = [(_TOP1, 1), (_sample_settings(model, request), 1 if request.top1 else request.samples)]
    grid: list[Tensor] = []
    for index, original in _crop_images(examples, model, [], [], []):
        columns = []
        for ratio in FIGURE_RATIOS:
            hidden = ratio_mask(ratio, [request.seed + index], shape)
            seeds = [request.seed + index + number for number in range(request.samples)]
            columns.append(
                torch.cat([_fill_codes(model, original, hidden, seeds[:rows], settings) for settings, rows in methods])
            )
        filled = torch.stack(columns, 1)  # [rows, ratios, 3, H, W]
        first = original.expand(len(filled), 1, -1, -1, -1).clone()
        first[1:] = 255  # the original is shown once, beside its first row
        grid.append(torch.cat([first, filled], 1).flatten(0, 1))
    names = [name for name, (_, count) in zip(("likeliest", "drawn"), methods, strict=True) for _ in range(count)]
    headings = ["original", *(f"{ratio:.0%} hidden" for ratio in FIGURE_RATIOS)]
    grids.save(path, torch.cat(grid), len(headings), rows=names * len(grid), headings=headings)
