"""`movq evaluate --codebook`: how much of its codebook a tokenizer uses for a set of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from movq_cli import checkpoints, runs
from movq_cli.console import Console
from movq_cli.data.coding import encode_batch, naming_images
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.evaluation.metric import MetricValues
from movq_cli.files import sha256
from movq_cli.models.quantizer import CodebookHealth
from movq_cli.sources import stream

DECIMALS = {"codebook_perplexity": 0}
"""Decimals in tables, by result key."""


def measure_codebook(
    images: ImageSet, run: Path | None, batch_size: int, device: torch.device, console: Console
) -> tuple[MetricValues, dict[str, Any]]:
    """Encode a set of images and count how often each codebook entry is used.

    Args:
        images: The images.
        run: Run folder or weight file of the tokenizer; None uses the newest finished run.
        batch_size: Number of images in a batch.
        device: Device that runs the tokenizer.
        console: Console for progress.

    Returns:
        The usage, which is the share of entries that are used at all, and the perplexity, which is the exponential of
        the codes' entropy, over all chunks together; and the entry of the protocol, with the tokenizer and the same
        two values of each chunk.

    Raises:
        BadRequestError: There is no such tokenizer.
    """
    path = runs.find_weights(run, "vq")
    console.log(f"tokenizer: {path}")
    model = checkpoints.load_tokenizer(path).to(device)
    health = CodebookHealth(model.settings.chunks, model.settings.codebook_size).to(device)
    with console.progress(len(images), "encoding", "images") as progress:
        readable = ((index, image) for index, image in images.read(range(len(images))) if image is not None)
        for indices, batch in stream.same_size_batches(readable, batch_size):
            with naming_images([images.names[index] for index in indices.tolist()], batch.shape[-2:]):
                health.update(encode_batch(model, batch.to(device)))
            progress.advance(len(indices))
    usage, usage_of_chunks = health.usage()
    perplexity, perplexity_of_chunks = health.perplexity()
    protocol = {
        "variant": f"of {model.settings.codebook_size} entries, all {model.settings.chunks} chunks together",
        "tokenizer": {"path": str(path), "sha256": sha256(path)},
        "usage_of_chunks": usage_of_chunks,
        "perplexity_of_chunks": perplexity_of_chunks,
        "images": len(images) - len(images.unreadable),
    }
    return {"codebook_usage": usage, "codebook_perplexity": perplexity}, protocol
