"""`movq evaluate --stats`: the reference statistics of a set, against which FID can be measured without its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from movq_cli.console import Console
from movq_cli.data.output_files import STATISTICS, refuse_foreign
from movq_cli.evaluation import cautions, extractors, feature_cache, pretrained, references
from movq_cli.evaluation.metrics import FID
from movq_cli.evaluation.processes import Process, run_on_ranks
from movq_cli.evaluation.request import EvaluationRequest
from movq_cli.evaluation.sides import open_images, require_effect
from movq_cli.paths import expand_path
from movq_cli.sources.outputs import refuse_replaced


def statistics(
    out: str, location: str, request: EvaluationRequest, *, arguments: Sequence[str], console: Console
) -> None:
    """Write the mean and the covariance of Inception's pool features of a set.

    Args:
        out: An .npz file, in the format of guided-diffusion's tools; or a name by which `movq evaluate` finds them.
        location: The images.
        request: The split, the crop, the weights and the device.
        arguments: Arguments of the command line, with which further processes are started.
        console: Console for the result and the warnings.

    Raises:
        BadRequestError: The images or the weights cannot be used, or `out` is a file that movq did not write.
        FailureError: The file cannot be written, or an image of a strict set is corrupt.
    """
    path = references.statistics_path(out, request.cache)
    if out.endswith(".npz"):
        path = expand_path(Path(out))
        refuse_foreign(path, STATISTICS)
    run_on_ranks(lambda process: _write_statistics(path, location, request, process, console), request, arguments)


def _write_statistics(
    path: Path, location: str, request: EvaluationRequest, process: Process, console: Console
) -> None:
    images = open_images("real", location, request, console)
    require_effect([images], request)
    FID.require_images(len(images))
    refuse_replaced([path], [Path(location)])
    network = extractors.load_extractor(references.NETWORK, request.weights, process.device)
    features = feature_cache.cached_features(
        images,
        network,
        request.cache,
        batch_size=request.batch_size,
        device=process.device,
        ranks=process.ranks,
        console=console,
    )
    for line in cautions.after([images]):
        console.warn(line)
    if process.ranks.is_first:
        mu, sigma = features.statistics(process.device)
        described = images.describe() | {"weights": {references.NETWORK: pretrained.record(network.weights)}}
        feature_cache.write_reference(path, mu, sigma, described | {"extractor": network.name})
        console.result({"path": str(path), "images": len(features.indices)}, str(path))
    process.barrier()
