"""`movq reconstruct` with part of the codes hidden: the masked prior fills them in (appendix A, and in-painting)."""

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
from movq_cli.commands.reconstruct import output_names
from movq_cli.console import Console
from movq_cli.data import pixels
from movq_cli.data.images import BadImageError, center_crop, decode, encode_png, resize_short_side
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write
from movq_cli.models.masked_prior import ratio_mask
from movq_cli.settings import SampleSettings
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source

FIGURE_RATIOS = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2)
"""Columns of the grid after figure A.1."""

_FIGURE_IMAGES = 4
_WHITE = 128
"""From this grey value on a mask's pixel is to be filled."""

_TOP1 = SampleSettings(steps=1, top_k=1)
"""Every hidden code at once, the likeliest of each."""


@dataclass(frozen=True)
class Filling:
    """What is hidden and how it is filled."""

    ratio: float | None
    """Share of the codes that is hidden, in [0, 1]; None = what `picture` paints."""
    picture: Path | None
    """White is filled; None = by ratio."""
    top1: bool
    """The likeliest codes in one step, instead of drawn ones."""
    samples: int
    """Fillings drawn of each image."""
    steps: int | None
    """Decoding steps of those; None = the prior's."""
    seed: int
    """Of the first filling of the first image."""
    figure: Path | None
    """Also make this grid: some images, ratios as columns, the likeliest filling over drawn ones as rows."""


def fill(
    source: str,
    out: Path,
    filling: Filling,
    *,
    prior: Path | None,
    split: SplitName | None,
    device: str | None,
    console: Console,
) -> None:
    """Hide part of every image's codes, fill it in, and write what comes out.

    Images are cut to the prior's size. Filled by ratio, an image is decoded whole; filled by a painted mask, it stays
    as it is outside of what is white.

    Args:
        source: Folder, archive, image, prepared set or a set's name.
        out: Folder of the PNGs; with several samples an image, NAME-0.png, NAME-1.png ...
        filling: What is hidden and how it is filled.
        prior: Run folder or weight file of a masked prior; None = the newest finished run.
        split: Of a source with splits; None = everything.
        device: Name; None = CUDA where there is one.
        console: Where to speak.

    Raises:
        BadRequestError: The prior is not a masked one, or an image or the mask cannot be read.
    """
    weights = runs.find_weights(prior, "prior")
    console.log(f"prior: {weights}")
    model = Prior.load(weights).to(devices.select(device))
    if not model.transformer.fills_hidden_codes:
        raise BadRequestError(
            f"{weights} cannot fill in hidden codes: this prior {model.transformer.decoding}",
            "Name a masked prior (movq train-prior --mode mask) with --prior.",
        )
    images = open_source(source, split)
    painted = None if filling.picture is None else _painted(filling.picture, model)
    names = output_names(images.names)
    with console.progress(len(images), "filling", "images") as progress:
        for place, original in _cut(images, model):
            for number, image in enumerate(_fillings(model, original, painted, filling, place)):
                name = Path(names[place])
                one = name if filling.samples == 1 else name.with_stem(f"{name.stem}-{number}")
                atomic_write(out / one, encode_png(pixels.to_image(image)))
            progress.advance()
    result: dict[str, object] = {"path": str(out), "images": len(images), "fillings": filling.samples}
    if filling.figure is not None:
        _draw_figure(filling, model, images)
        result["figure"] = str(filling.figure)
    console.result(result, str(out))


def _fillings(model: Prior, original: Tensor, painted: Tensor | None, filling: Filling, place: int) -> Sequence[Tensor]:
    """The fillings [3, H, W] uint8 of one image [3, H, W] uint8."""
    seeds = [filling.seed + place * filling.samples + number for number in range(filling.samples)]
    if painted is None:
        assert filling.ratio is not None
        hidden = ratio_mask(filling.ratio, [filling.seed + place], model.transformer.shape)
    else:
        hidden = _touched(painted, model)
    made = _filled(model, original, hidden, seeds, _settings(model, filling))
    return list(made) if painted is None else [torch.where(painted, image, original) for image in made]


@torch.inference_mode()
def _filled(model: Prior, original: Tensor, hidden: Tensor, seeds: Sequence[int], settings: SampleSettings) -> Tensor:
    """Images [len(seeds), 3, H, W] uint8 whose codes are the original's where nothing is hidden."""
    prior, tokenizer, device = model.transformer, model.tokenizer, model.transformer.position.device
    codes = tokenizer.encode(pixels.to_signed(original[None].to(device)))
    known = codes.masked_fill(hidden.to(device), prior.unknown).repeat(len(seeds), 1, 1, 1)
    # Without a class: what the image shows is for its visible codes to say.
    classes = torch.full((len(seeds),), prior.unknown, device=device) if model.classes else None
    with devices.autocast(device, "auto"):
        drawn = prior.decode(seeds, classes, settings, known)
    return pixels.to_bytes(tokenizer.decode(drawn)).cpu()


def _settings(model: Prior, filling: Filling) -> SampleSettings:
    if filling.top1:
        return _TOP1
    usual = model.header.sample.model_copy(update={"guidance": 0.0})
    return usual if filling.steps is None else usual.model_copy(update={"steps": filling.steps})


def _cut(images: Source, model: Prior) -> Iterator[tuple[int, Tensor]]:
    """Every image, cut to the prior's size, with its place."""
    for place, name in enumerate(images.names):
        try:
            yield place, _square(images.read(place), model)
        except BadImageError as error:
            raise BadRequestError(f"{name} in {images.location} cannot be read: {error}") from None


def _square(data: bytes, model: Prior) -> Tensor:
    """[3, side, side] uint8 of an image file."""
    side = model.transformer.shape.height * model.tokenizer.settings.factor
    image = center_crop(resize_short_side(decode(data), side, upscale=True), side)
    return pixels.from_array(np.asarray(image))


def _painted(path: Path, model: Prior) -> Tensor:
    """Which pixels [1, H, W] bool a mask paints."""
    try:
        return _square(path.read_bytes(), model).float().mean(0, keepdim=True) >= _WHITE
    except OSError as error:
        raise BadRequestError(f"--mask {path} cannot be read: {error.strerror}") from None
    except BadImageError as error:
        raise BadRequestError(f"--mask {path} is no picture: {error}") from None


def _touched(painted: Tensor, model: Prior) -> Tensor:
    """The codes [1, h, w, c] bool whose square has a painted pixel."""
    squares = F.max_pool2d(painted[None].float(), model.tokenizer.settings.factor)[0] > 0
    return squares[..., None].expand(-1, -1, -1, model.transformer.shape.chunks)


def _draw_figure(filling: Filling, model: Prior, images: Source) -> None:
    """Figure A.1: for each image a row of likeliest fillings over rows of drawn ones, a column a ratio."""
    assert filling.figure is not None
    chosen = images.take(pixels.evenly_spaced(len(images), _FIGURE_IMAGES))
    shape, drawn = model.transformer.shape, _settings(model, filling)
    rows: list[Tensor] = []
    for place, original in _cut(chosen, model):
        ways = [(_TOP1, 1), (drawn, 1 if filling.top1 else filling.samples)]
        columns = []
        for ratio in FIGURE_RATIOS:
            hidden = ratio_mask(ratio, [filling.seed + place], shape)
            seeds = [filling.seed + place + number for number in range(filling.samples)]
            columns.append(torch.cat([_filled(model, original, hidden, seeds[:count], way) for way, count in ways]))
        made = torch.stack(columns, 1)  # [rows, ratios, 3, H, W]
        first = original.expand(len(made), 1, -1, -1, -1).clone()
        first[1:] = 255  # the original stands once, beside its first row
        rows.append(torch.cat([first, made], 1).flatten(0, 1))
    pixels.save_grid(filling.figure, torch.cat(rows), 1 + len(FIGURE_RATIOS), pixels.grid_scale(original.shape[-1]))
