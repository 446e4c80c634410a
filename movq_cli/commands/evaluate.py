"""`movq evaluate`: the metrics of one set of images against another, with the protocol of how they were measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from movq_cli import agreement, checkpoints, devices, presets, runs
from movq_cli.console import Console
from movq_cli.data.output_files import RESULT, refuse_foreign
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import cautions, extractors, protocol
from movq_cli.evaluation import codes as code_metrics
from movq_cli.evaluation.codebook import measure_codebook
from movq_cli.evaluation.comparison import Comparison
from movq_cli.evaluation.processes import Process, run_on_ranks
from movq_cli.evaluation.request import EvaluationRequest
from movq_cli.evaluation.selection import select_metrics
from movq_cli.evaluation.sides import Sides, open_images, require_effect
from movq_cli.settings import Targets
from movq_cli.sources.outputs import images_at, protect_source, refuse_replaced


def evaluate(
    first: str, second: str, request: EvaluationRequest, *, arguments: Sequence[str], console: Console
) -> None:
    """Compare two sets of images.

    Args:
        first: Real images: a folder, zip, tar, prepared set or .npz file; or statistics, by file or by name.
        second: Fake images: samples, or reconstructions that have the names of their originals.
        request: The metrics and all other options.
        arguments: Arguments of the command line, with which further processes are started.
        console: Console for the result and the warnings.

    Raises:
        BadRequestError: The inputs cannot be used, there are no pairs, or weights are missing or cannot be used. The
            metrics that need no missing weights are printed before that error.
        FailureError: An image of a strict set is corrupt, or a file cannot be written.
    """
    targets = None if request.preset is None else presets.load(request.preset).target
    if request.out is not None and request.out.is_dir():
        raise BadRequestError(f"{request.out} is a folder", "--out names the JSON file to write.")
    run_on_ranks(lambda process: _compare(first, second, request, targets, process, console), request, arguments)


def _compare(
    first: str, second: str, request: EvaluationRequest, targets: Targets | None, process: Process, console: Console
) -> None:
    agreement.require_shared(process.ranks, request.cache)
    sides = Sides.open(first, second, request, console)
    require_effect(sides.with_images, request)
    _protect_inputs(first, second, sides, request)
    if not process.ranks.is_one_machine:
        agreement.require_same(process.ranks, {f"the {side.role} set": side.content_hash for side in sides.with_images})
    selection = select_metrics(sides, request, process.ranks, console)
    for line in cautions.before(sides.with_images, selection.metrics):
        console.warn(line)
    comparison = Comparison(sides, request, process.ranks, process.device, console)
    values = comparison.measure(selection.metrics)
    for line in cautions.after(sides.with_images):
        console.warn(line)
    if targets is not None and request.preset is not None:
        mode = None if selection.has_pairs else sides.fake.sampled_mode
        if not selection.has_pairs and mode is None:
            console.warn(
                f"{second} has no manifest of `movq sample`, which says what drew the images: "
                "no published values of samples are shown"
            )
        comparison.protocol["published"] = protocol.published_values(
            values, request.preset, targets, mode, reconstructed=selection.has_pairs
        )
    if process.ranks.is_first:
        protocol.report(values, comparison.protocol, request.out, console)
    process.barrier()
    selection.raise_missing()


def _protect_inputs(first: str, second: str, sides: Sides, request: EvaluationRequest) -> None:
    """Refuse output files that would replace a file that is read or is not movq's, or become an image of a set.

    Raises:
        BadRequestError: A file is such a one.
    """
    if request.copies is not None:
        refuse_replaced([request.copies], [path for side in sides.with_images for path in images_at(side.source)])
        for side in sides.with_images:
            protect_source(side.source, [], [], pictures=[request.copies])
    written = [path for path in (request.copies, request.out) if path is not None]
    refuse_replaced(written, [Path(first), Path(second)])
    _protect_result(request)


def _protect_result(request: EvaluationRequest) -> None:
    """Refuse a file for the result that exists and that movq did not write."""
    if request.out is not None:
        refuse_foreign(request.out, RESULT)


def codebook(location: str, request: EvaluationRequest, console: Console) -> None:
    """Measure how one set of images uses a tokenizer's codebook.

    Args:
        location: The images.
        request: The tokenizer's run, the split, the crop and the device.
        console: Console for the result.

    Raises:
        BadRequestError: There are no images, or no such tokenizer.
    """
    _protect_result(request)
    device = devices.select(request.device)
    images = open_images("real", location, request, console)
    require_effect([images], request)
    with torch.inference_mode():
        values, used = measure_codebook(images, request.run, request.batch_size, device, console)
    described = {"real": images.describe(), "codebook": used, "variants": dict.fromkeys(values, used["variant"])}
    protocol.report(values, protocol.conditions(device) | described, request.out, console)


def codes(location: str, request: EvaluationRequest, console: Console) -> None:
    """Measure whether a tokenizer's codes of one set of images are easy to generate.

    Args:
        location: The images; by default their central squares of the tokenizer's size are used, as a prior does.
        request: The tokenizer's run, the split, the crop, the device, the weights and the file of the result.
        console: Console for the result.

    Raises:
        BadRequestError: There are no images, or there is no such tokenizer.
    """
    _protect_result(request)
    device = devices.select(request.device)
    path = runs.find_weights(request.run, "vq")
    console.log(f"tokenizer: {path}")
    model = checkpoints.load_tokenizer(path).to(device)
    crop = request.crop or model.settings.image_size
    images = open_images("real", location, dataclasses.replace(request, crop=crop), console)
    require_effect([images], request)
    with torch.inference_mode(), extractors.exact_float32():
        measured, described = code_metrics.measure_codes(model, path, images, request.batch_size, console)
        values, variants = measured.values()
        fids = code_metrics.perturbed_fid(model, measured.codes, images, request, console)
    weights = {}
    if fids:
        shares = [share for share in fids if share > 0]
        values |= {"code_rfid": fids[0.0], "perturbed_fid": statistics.mean(fids[share] for share in shares)}
        variants["code_rfid"] = "FID of reconstructions from the codes as they are"
        replaced = ", ".join(f"{share:.0%}" for share in shares)
        variants["perturbed_fid"] = f"FID of reconstructions, mean over {replaced} of the codes replaced by near ones"
        described["perturbed_fids"] = {str(share): fid for share, fid in fids.items()}
        weights = {"weights": protocol.describe_weights(["inception"], request.weights, console)}
    root = path.parent.parent if len(path.parts) > 2 else path.resolve().parent.parent
    gains, variant, described["priors"] = code_metrics.prior_values(root, model, described["tokenizer"]["sha256"])
    values, variants = {**values, **gains}, variants | dict.fromkeys(gains, variant)
    entries = {"real": images.describe(), "codes": described, "variants": variants, **weights}
    protocol.report(values, protocol.conditions(device) | entries, request.out, console)
