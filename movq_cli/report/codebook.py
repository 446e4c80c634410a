"""The codebook on the page: how often each entry is used, what the entries stand for, and the codes of a picture."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from movq_cli import checkpoints
from movq_cli.data import loader, pixels
from movq_cli.data.shards import MANIFEST, PreparedSet
from movq_cli.data.spacing import evenly_spaced
from movq_cli.errors import MovqError
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.report import charts
from movq_cli.report.blocks import Block, Gallery, Picture, Text
from movq_cli.report.pictures import Pixels, data_uri, enlarged, originals_and_reconstructions
from movq_cli.run_history import RunHistory

_IMAGES = 64
"""Largest number of validation images that are encoded."""

_ENTRIES = 48
"""Number of entries with a picture."""

_ENTRY_SIDE = 32
"""Displayed side of an entry's picture, at least, pixels."""

_MAPPED = 2
"""Number of pictures with a code map."""


def blocks(history: RunHistory, device: torch.device) -> list[Block]:
    """Return the parts of the page about the codebook.

    Args:
        history: Run of a tokenizer.
        device: Device of the model.

    Raises:
        MovqError: The weights cannot be read.
    """
    images, origin = _images(history)
    if images is None:
        return [Text("Codebook", "The run has no picture and no prepared set whose images could be encoded.")]
    model = checkpoints.load_tokenizer(history.run.weights).to(device).eval()
    signed = pixels.to_signed(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))
    codes = torch.cat([model.encode(batch) for batch in signed.split(8)]).cpu().numpy()
    size, chunks = model.settings.codebook_size, codes.shape[-1]
    counts = np.stack([np.bincount(codes[..., chunk].ravel(), minlength=size) for chunk in range(chunks)])
    return [
        charts.of_bars(
            "How often each entry is used",
            f"Share of all codes that each of the {size:,} entries has, most used first, in {origin}. Healthy: a "
            "gentle slope to the right end. A cliff on the left means that a few entries do all the work: a collapse. "
            f"These images use {(counts.sum(0) > 0).mean():.0%} of the entries; few images cannot use all.",
            np.sort(counts.sum(0))[::-1] / max(1, counts.sum()),
            x_title="rank of the entry",
            y_title="share of codes",
        ),
        _entries(images, codes, counts, model, origin),
        _maps(images, codes, model),
    ]


def _images(history: RunHistory) -> tuple[Pixels | None, str]:
    """Return validation images [B, H, W, 3], and where they come from: the prepared set, or the last picture."""
    root = history.manifest.settings.data.path
    try:
        if (root / MANIFEST).is_file():
            prepared = PreparedSet.open(root)
            if prepared.manifest.hash == history.manifest.data and prepared.manifest.counts["val"]:
                split = prepared.split("val")
                chosen = evenly_spaced(len(split), _IMAGES)
                size = history.manifest.settings.vq.image_size
                crops = loader.center_crops(split, chosen, resolution=size, device=torch.device("cpu"))
                return crops.permute(0, 2, 3, 1).numpy(), f"{len(chosen)} validation images"
    except (MovqError, OSError):
        pass  # The set is damaged, or elsewhere; the picture has some of its images.
    for step in reversed(history.pictures):
        found = originals_and_reconstructions(history, step)
        if found is not None:
            return found[0], f"the {len(found[0])} images of the last picture"
    return None, ""


def _entries(
    images: Pixels, codes: NDArray[np.int64], counts: NDArray[np.int64], model: Tokenizer, origin: str
) -> Gallery:
    """Return the mean image area of the positions at which each of the most used entries was chosen."""
    factor = model.settings.factor
    batch, height, width, chunks = codes.shape
    areas = images.reshape(batch, height, factor, width, factor, 3).transpose(0, 1, 3, 2, 4, 5)
    areas = areas.reshape(-1, factor, factor, 3).astype(np.float64)
    flat = codes.reshape(-1, chunks)
    shown = np.argsort(-counts.sum(0), kind="stable")[:_ENTRIES]
    shown = shown[counts.sum(0)[shown] > 0]
    enlargement = max(1, _ENTRY_SIDE // factor)
    pictures = []
    for entry in shown:
        mean = areas[(flat == entry).any(1)].mean(0).round().astype(np.uint8)
        share = counts[:, entry].sum() / counts.sum()
        pictures.append(Picture(data_uri(enlarged(mean, enlargement)), f"{entry}: {share:.1%}", enlargement * factor))
    return Gallery(
        "The most used entries",
        f"The mean of the {factor} x {factor} pixels at all positions with the entry, in {origin}; below "
        "it its index and share of the codes. Healthy: they differ in color and in the direction of edges. Equal "
        "pictures mean entries that do the same work.",
        pictures,
    )


def _maps(images: Pixels, codes: NDArray[np.int64], model: Tokenizer) -> Gallery:
    """Return some images, and for each chunk the map of its codes over the image."""
    colors = _entry_colors(model)
    scale = max(1, 192 // images.shape[2])
    pictures = []
    for index in evenly_spaced(len(images), _MAPPED):
        image = enlarged(images[index], scale)
        pictures.append(Picture(data_uri(image), "original", image.shape[1]))
        for chunk in range(codes.shape[-1]):
            factor = model.settings.factor * scale
            over = enlarged(colors[codes[index, :, :, chunk]], factor)
            mixed = (0.25 * image.mean(-1, keepdims=True) + 0.75 * over).round().astype(np.uint8)
            pictures.append(Picture(data_uri(mixed), f"codes of chunk {chunk}", image.shape[1]))
    return Gallery(
        "Codes over a picture",
        "Entries that are near to each other have similar colors. Healthy: the map follows the shapes of the picture, "
        "and the chunks differ. One color everywhere means that the chunk says nothing.",
        pictures,
    )


def _entry_colors(model: Tokenizer) -> Pixels:
    """Return a color for each entry, [K, 3]: its position along the three main directions of the codebook."""
    size, device = model.settings.codebook_size, model.device
    every = torch.arange(size, device=device)[:, None, None, None].expand(-1, 1, 1, model.settings.chunks)
    with torch.inference_mode():
        vectors: Tensor = torch.cat([model.quantize.decode(part).flatten(1) for part in every.split(1024)])
    centred = (vectors - vectors.mean(0)).double().cpu()
    directions = torch.linalg.svd(centred.T @ centred)[0][:, :3]
    order = (centred @ directions).argsort(0).argsort(0).double() / max(1, size - 1)
    if order.shape[1] < 3:
        order = order.repeat(1, 3)[:, :3]
    return (40 + 200 * order).round().to(torch.uint8).numpy()
