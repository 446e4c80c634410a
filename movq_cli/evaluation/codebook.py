"""`movq evaluate --codebook`: how much of its codebook a tokenizer uses for a set of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from movq_cli import checkpoints, runs
from movq_cli.console import Console
from movq_cli.data.coding import encode_batch
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.files import sha256
from movq_cli.models.quantizer import CodebookHealth
from movq_cli.sources import stream


def codebook_figures(
    images: ImageSet, run: Path | None, batch_size: int, device: torch.device, console: Console
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Encode a set and count the codes.

    Args:
        images: The set.
        run: The tokenizer's run folder or weight file; None = the newest finished run.
        batch_size: Images at once.
        device: Where.
        console: For the progress.

    Returns:
        Usage, the share of entries that are used at all, and perplexity, the exponential of the codes' entropy, over
        all chunks together; and for the protocol the tokenizer and the same figures of each chunk.

    Raises:
        BadRequestError: There is no such tokenizer.
    """
    path = runs.find_weights(run, "vq")
    console.log(f"tokenizer: {path}")
    model = checkpoints.load_tokenizer(path).to(device)
    health = CodebookHealth(model.settings.chunks, model.settings.codebook_size).to(device)
    with console.progress(len(images), "encoding", "images") as progress:
        readable = ((place, image) for place, image in images.read(range(len(images))) if image is not None)
        for places, batch in stream.same_size_batches(readable, batch_size):
            health.update(encode_batch(model, batch.to(device)))
            progress.advance(len(places))
    usage, of_chunks = health.usage()
    perplexity, perplexities = health.perplexity()
    protocol = {
        "variant": f"of {model.settings.codebook_size} entries, all {model.settings.chunks} chunks together",
        "tokenizer": {"path": str(path), "sha256": sha256(path)},
        "usage_of_chunks": of_chunks,
        "perplexity_of_chunks": perplexities,
        "images": len(images) - len(images.unreadable),
    }
    return {"codebook_usage": usage, "codebook_perplexity": perplexity}, protocol
