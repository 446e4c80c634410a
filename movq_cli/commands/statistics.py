"""`movq evaluate --stats`: a set's reference statistics, for FID against it without its images."""

from __future__ import annotations

import sys
from pathlib import Path

from movq_cli import ranks, signals
from movq_cli.console import Console
from movq_cli.evaluation import cautions, distributions, extractors, feature_cache, pretrained
from movq_cli.evaluation.comparison import EvaluationRequest, kept_statistics
from movq_cli.evaluation.image_sets import ImageSet


def statistics(out: str, location: str, asked: EvaluationRequest, console: Console) -> None:
    """Write the mean and covariance of Inception's pool features.

    Args:
        out: An .npz file, as guided-diffusion's tools read it; or a name, by which `movq evaluate` finds them.
        location: The set.
        asked: Split, crop, weights and device.
        console: Where to speak.

    Raises:
        BadRequestError: The set or the weights cannot be used.
        FailureError: The file cannot be written, or an image is corrupt where none may be.
    """
    if asked.gpus is not None and not ranks.is_launched():
        ranks.launch(sys.argv[1:], asked.gpus, asked.device)
        return
    path = Path(out) if out.endswith(".npz") else kept_statistics(out, asked.cache)
    with (
        ranks.joined_ranks(asked.device) as (mine, where),
        signals.interruptible("the features computed", launched=mine.world_size > 1),
        mine.long_barrier() as barrier,
        extractors.exact_float32(),
    ):
        images = ImageSet("real", location, asked.split, crop=asked.crop, strict=asked.strict, console=console)
        distributions.require_images("fid", len(images))
        network = extractors.load_inception(asked.weights, where)
        found = feature_cache.cached_features(
            images, network, asked.cache, batch_size=asked.batch_size, device=where, ranks=mine, console=console
        )
        for line in cautions.after([images]):
            console.warn(line)
        if mine.is_first:
            mu, sigma = found.statistics(where)
            protocol = images.describe() | {"weights": {"inception": pretrained.record(network.weights)}}
            feature_cache.write_reference(path, mu, sigma, protocol | {"extractor": network.name})
            console.result({"path": str(path), "images": len(found.places)}, str(path))
        barrier()
