"""The samples of a prior on the page: decoding step by step, and the nearest training images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from movq_cli import checkpoints, devices
from movq_cli.data import code_cache, pixels
from movq_cli.data.code_cache import CodeCache
from movq_cli.errors import MovqError
from movq_cli.models.code_prior import CodePrior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.report.blocks import Block, Film, Row, Text
from movq_cli.report.pictures import Pixels, data_uri, strip
from movq_cli.run_history import RunHistory
from movq_cli.settings import SampleSettings

_SAMPLES = 8
"""Number of samples."""

_MOST_VIEWS = 20_000
"""Largest number of training images that are compared with each sample."""

_VECTORS = 2**24
"""Largest number of values in memory of the vectors of training images."""

_UNDECIDED = np.array((128, 128, 128), dtype=np.float64)
"""Color of the image area whose codes are not decided yet."""

_NEAREST = "Nearest training images"


def blocks(history: RunHistory, device: torch.device) -> list[Block]:
    """Return the parts of the page about the samples of a prior.

    Args:
        history: Run of a prior.
        device: Device of the models.

    Raises:
        MovqError: The weights cannot be read.
    """
    prior, header = checkpoints.load_prior(history.run.weights)
    tokenizer = checkpoints.load_tokenizer(history.run.tokenizer)
    prior, tokenizer = prior.to(device).eval(), tokenizer.to(device).eval()
    count = len(header.classes)
    classes = torch.arange(_SAMPLES, device=device) % count if count else None
    names = [header.classes[index % count] for index in range(_SAMPLES)] if count else [""] * _SAMPLES
    with devices.autocast(device, "auto"):
        codes, states = _decode(prior, classes, header.sample)
        images = _images(tokenizer, codes)
    steps = _steps(images, states, prior, names)
    return [steps, _nearest(history, header.tokenizer, tokenizer, codes, images, names)]


def _decode(prior: CodePrior, classes: Tensor | None, settings: SampleSettings) -> tuple[Tensor, list[Tensor]]:
    """Return the codes [B, h, w, c] of samples, and those before each forward pass that saw all images."""
    states: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) >= _SAMPLES:  # With guidance, a second half has no class.
            states.append(inputs[0][:_SAMPLES].clone())

    hook = prior.register_forward_pre_hook(record)
    try:
        codes = prior.decode(range(_SAMPLES), classes, settings)
    finally:
        hook.remove()
    return codes, states


def _images(tokenizer: Tokenizer, codes: Tensor) -> Pixels:
    """Return the images [B, H, W, 3] of codes."""
    return pixels.to_bytes(tokenizer.decode(codes)).permute(0, 2, 3, 1).cpu().numpy()


def _steps(images: Pixels, states: list[Tensor], prior: CodePrior, names: list[str]) -> Film | Text:
    """Return the decoding of samples step by step."""
    title = "Decoding step by step"
    if not prior.fills_hidden_codes or not states:
        return Text(title, f"This prior {prior.decoding}; only a masked prior decodes in parallel steps.")
    # The first step has no state of its own if all images share its forward pass.
    known = [(state != prior.unknown).double().mean(-1).cpu().numpy() for state in states]
    known = [share for share in known if share.any()]
    known.append(np.ones_like(known[-1]) if known else np.ones((len(images), *prior.shape.size[:2])))
    height, width = images.shape[1] // prior.shape.height, images.shape[2] // prior.shape.width
    frames = []
    for share in known:
        weight = share.repeat(height, 1).repeat(width, 2)[..., None]
        frames.append(data_uri(strip((weight * images + (1 - weight) * _UNDECIDED).round().astype(np.uint8))))
    decided = ", ".join(f"{share.mean():.0%}" for share in known)
    note = (
        "The final samples; an area is grey as far as its codes are not decided yet. After the steps, "
        f"{decided} of the codes are decided. Healthy: few codes at first, all over the image, and most at the end."
    )
    size = images.shape[2] * len(images)
    zoom = max(1, min(6, 900 // size))
    return Film(title, note, "decoding step", [*range(1, len(frames) + 1)], [Row("samples", frames)], names, size, zoom)


def _nearest(
    history: RunHistory, tokenizer_digest: str, tokenizer: Tokenizer, codes: Tensor, images: Pixels, names: list[str]
) -> Film | Text:
    """Return the samples above the training images whose code vectors are nearest."""
    cache = next(_training_caches(history, tokenizer_digest), None)
    if cache is None:
        note = "No cache of the training images' codes was found beside this run, in tokens/ of its tokenizer's folder."
        return Text(_NEAREST, note)
    chosen = np.unique(np.linspace(0, len(cache) - 1, min(len(cache), _MOST_VIEWS)).astype(np.int64))
    nearest = _nearest_rows(tokenizer, codes, cache.codes, chosen)
    found = torch.from_numpy(cache.codes[nearest].astype(np.int64)).to(codes.device)
    equal = (found == codes).double().flatten(1).mean(1).tolist()
    pictures = [data_uri(strip(images)), data_uri(strip(_images(tokenizer, found)))]
    rows = [Row("samples", pictures[:1]), Row("nearest", pictures[1:])]
    size = images.shape[2] * len(images)
    columns = [f"{name} {share:.0%}".strip() for name, share in zip(names, equal, strict=True)]
    part = "all" if len(chosen) == len(cache) else f"{len(chosen):,} of the"
    note = (
        f"Below each sample the nearest of {part} {len(cache):,} training views, by the distance of their code "
        "vectors, and above it the share of their codes that are equal. Healthy: alike but not the same; a share above "
        "about 50% is a copy of a training image."
    )
    return Film(_NEAREST, note, "step", [history.manifest.step], rows, columns, size, max(1, min(6, 900 // size)))


def _nearest_rows(
    tokenizer: Tokenizer, codes: Tensor, training: NDArray[np.uint16], chosen: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rows of the training codes whose vectors are nearest to those of each sample."""
    with torch.inference_mode():
        samples = tokenizer.quantize.decode(codes).flatten(1)
        batch = max(1, _VECTORS // samples.shape[1])
        best = torch.full((len(samples),), torch.inf, device=samples.device)
        rows = torch.zeros(len(samples), dtype=torch.int64)
        for start in range(0, len(chosen), batch):
            indices = chosen[start : start + batch]
            part = torch.from_numpy(training[indices].astype(np.int64)).to(codes.device)
            distance = torch.cdist(samples, tokenizer.quantize.decode(part).flatten(1))
            value, index = distance.min(1)
            is_nearer = (value < best).cpu()
            rows[is_nearer] = torch.from_numpy(indices)[index.cpu()][is_nearer]
            best = torch.minimum(best, value)
    return rows.numpy()


def _training_caches(history: RunHistory, tokenizer_digest: str) -> Iterator[CodeCache]:
    """Yield the caches of the training images' codes by this tokenizer, in this run's folder and in those beside it."""
    folder = history.run.folder.resolve()
    for root in (folder, *sorted(path for path in folder.parent.iterdir() if path.is_dir() and path != folder)):
        for cache in sorted(root.glob("tokens/*-train*")):
            try:
                header = code_cache.read_cache_header(cache)
                if (header.tokenizer, header.data, header.split) == (tokenizer_digest, history.manifest.data, "train"):
                    yield CodeCache(cache, header)
            except (MovqError, OSError, ValueError):
                continue
