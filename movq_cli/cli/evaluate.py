"""The options of `movq evaluate`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from movq_cli.cli.colors import Background, color
from movq_cli.cli.options import (
    SIZE,
    BatchSize,
    DeviceName,
    Gpus,
    Json,
    Quiet,
    TokenizerRun,
    WeightsFolder,
    WeightsOf,
    chosen_weights,
    complete_preset_name,
    console_for,
    image_size,
    is_given,
    named_as,
    refuse_unused,
    split_name,
)
from movq_cli.console import Console
from movq_cli.data.output_files import PICTURE, RESULT
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import metrics
from movq_cli.evaluation.metric import PairedMetric, PixelMetric
from movq_cli.evaluation.request import EvaluationRequest
from movq_cli.files import cache_folder

F = TypeVar("F", bound=Callable[..., None])

Sets = Annotated[
    list[str],
    typer.Argument(
        metavar="REAL FAKE",
        help="Originals, then reconstructions or samples: a folder, zip, tar, prepared set or .npz file of pixels. "
        "REAL may be statistics. --stats and --codebook take one set, --codes one set that a run may precede, --table "
        "takes JSON files.",
        show_default=False,
    ),
]

Every = Annotated[bool, typer.Option("--all", help="Every metric that the inputs allow; downloads missing weights.")]

Codebook = Annotated[bool, typer.Option("--codebook", help="Usage and perplexity of a tokenizer's codebook on REAL.")]

Codes = Annotated[
    bool,
    typer.Option(
        "--codes", help="Whether a tokenizer's codes of REAL are easy to generate: entropy, mutual information, priors."
    ),
]

Copies = Annotated[
    Path | None,
    typer.Option(
        "--copies",
        callback=named_as(PICTURE),
        help="Search FAKE for copies of REAL, and write this picture of the nearest images.",
    ),
]

Statistics = Annotated[
    str | None,
    typer.Option("--stats", help="Write the statistics of REAL to this .npz file, or store them under this name."),
]

Table = Annotated[bool, typer.Option("--table", help="Print JSON results side by side, as Markdown.")]

Split = Annotated[str, typer.Option(help="Split of a prepared set: train or val.")]

Crop = Annotated[
    str | None,
    typer.Option(
        metavar=SIZE,
        help="Compare the central squares of this side, or rectangles of this size, in pixels, after resizing images "
        "to the smallest size that covers them. [default: images as they are]",
        show_default=False,
    ),
]

Strict = Annotated[bool, typer.Option("--strict", help="Stop at a corrupt image instead of leaving it out.")]

PublishedBy = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        help="Show the published values of this preset beside the results. [default: none]",
        show_default=False,
        autocompletion=complete_preset_name,
    ),
]

Cache = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder of the feature cache. [default: ~/.cache/movq]", show_default=False),
]

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        callback=named_as(RESULT),
        help="Also write the metrics and their protocol to this JSON file; with --table, those of all results.",
    ),
]


def with_metric_flags(command: F) -> F:
    """Put a flag for each registered metric in place of a command's `**flags`, before its options."""
    signature = inspect.signature(command, eval_str=True)
    first, context, *others, _ = signature.parameters.values()
    flags = [
        inspect.Parameter(
            metric.key,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=False,
            annotation=Annotated[bool, typer.Option(metric.option, help=metric.help)],
        )
        for metric in metrics.REGISTRY.values()
        if metric.option is not None
    ]
    command.__signature__ = signature.replace(parameters=[first, context, *flags, *others])  # type: ignore[attr-defined]
    return command


@with_metric_flags
def evaluate(
    sets: Sets,
    context: typer.Context,
    every: Every = False,
    codebook: Codebook = False,
    codes: Codes = False,
    copies: Copies = None,
    stats: Statistics = None,
    table: Table = False,
    split: Split = "val",
    crop: Crop = None,
    background: Background = "255,255,255",
    strict: Strict = False,
    preset: PublishedBy = None,
    run: TokenizerRun = None,
    weights_of: WeightsOf = "last",
    weights: WeightsFolder = None,
    cache: Cache = None,
    out: Out = None,
    batch_size: BatchSize = 32,
    device: DeviceName = None,
    gpus: Gpus = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **flags: bool,
) -> None:
    """Measure FAKE against REAL; by default every metric that the inputs and the available weights allow."""
    requested = tuple(key for key, is_requested in flags.items() if is_requested)
    console = console_for(as_json, quiet)
    is_codebook_alone = len(sets) == 1 and codebook and not requested and not every and copies is None
    _refuse_unused(
        context,
        requested,
        table=table,
        stats=stats is not None,
        codebook=codebook,
        codebook_alone=is_codebook_alone,
        codes=codes,
    )
    if table:
        from movq_cli.commands.evaluation_table import tabulate

        tabulate(sets, console, out)
        return
    if codes and run is None and len(sets) == 2 and _is_tokenizer(Path(sets[0])):
        run, sets = Path(sets[0]), sets[1:]  # movq evaluate --codes RUN SET
    rule = "--stats takes one set" if stats is not None else "--codes takes one set" if codes else None
    _check_number(sets, rule, is_codebook_alone=is_codebook_alone)
    request = EvaluationRequest(
        metrics=requested,
        require_weights=bool(requested) or every,
        copies=copies,
        codebook=codebook,
        run=chosen_weights(run, weights_of, "vq") if codebook or codes else run,
        split=split_name(split),
        crop=image_size(crop, "--crop", 8),
        background=color(background, "--background"),
        requires_background=is_given(context, "background"),
        strict=strict,
        batch_size=batch_size,
        weights=weights,
        cache=cache or cache_folder(),
        preset=preset,
        device=device,
        gpus=gpus,
        out=out,
        requires_splits=is_given(context, "split"),
    )
    _run(sets, stats, request, console, codes=codes)


def _is_tokenizer(path: Path) -> bool:
    """Return whether a path is a weight file or a run folder, and not a set of images."""
    return path.suffix == ".safetensors" or (path / "run.json").is_file()


def _refuse_unused(
    context: typer.Context,
    requested: Sequence[str],
    *,
    table: bool,
    stats: bool,
    codebook: bool,
    codebook_alone: bool,
    codes: bool,
) -> None:
    """Refuse options that have no effect beside others.

    Args:
        context: Context of the command.
        requested: Keys of the metrics whose flags are given.
        table: Whether results are printed side by side.
        stats: Whether statistics are written.
        codebook: Whether the use of a codebook is measured.
        codebook_alone: Whether nothing else is measured.
        codes: Whether the codes of a tokenizer are measured.

    Raises:
        BadRequestError: Such an option is given.
    """
    flags = (key for key, metric in metrics.REGISTRY.items() if metric.option)
    comparing = ("every", *flags, "copies", "preset", "out")
    of_tokenizer, of_networks = ("run", "weights_of"), ("weights", "cache", "gpus")
    if table:
        comparing = tuple(key for key in comparing if key != "out")
        of_images = ("split", "crop", "background", "strict", "batch_size", "device")
        refuse_unused(
            context, ("stats", "codebook", "codes", *comparing, *of_tokenizer, *of_networks, *of_images), "with --table"
        )
    if stats:
        refuse_unused(context, ("codebook", "codes", *comparing, *of_tokenizer), "with --stats")
    if codes:
        allowed = ("every", "out")
        others = tuple(name for name in comparing if name not in allowed)
        refuse_unused(context, ("codebook", *others, "gpus"), "with --codes")
    if codebook_alone:
        refuse_unused(context, ("preset", *of_networks), "with --codebook alone")
    if not codebook and not codes:
        refuse_unused(context, of_tokenizer, "without --codebook or --codes")
    chosen = [metrics.REGISTRY[key] for key in requested]
    if chosen and not stats and not is_given(context, "copies"):
        if all(issubclass(metric, PairedMetric) for metric in chosen):
            refuse_unused(context, ("cache",), "on metrics of pairs")
        if all(issubclass(metric, PixelMetric) for metric in chosen):
            refuse_unused(context, ("weights",), "on metrics without a network")
    if requested:
        refuse_unused(context, ("every",), f"beside {metrics.REGISTRY[requested[0]].option}")


def _check_number(sets: list[str], rule: str | None, *, is_codebook_alone: bool) -> None:
    """Refuse a number of sets that the options do not allow.

    Args:
        sets: The sets.
        rule: Which option takes a single set, in words; None if no such option is given.
        is_codebook_alone: Whether only the use of a codebook is measured, on one set.
    """
    takes_one_set = rule is not None or is_codebook_alone
    if len(sets) != (1 if takes_one_set else 2):
        rule = rule or "two sets are compared, REAL and FAKE"
        raise BadRequestError(f"{rule}, not {len(sets)} ({', '.join(sets)})", "See `movq evaluate --help`.")


def _run(sets: list[str], stats: str | None, request: EvaluationRequest, console: Console, *, codes: bool) -> None:
    """Write statistics, measure the codebook or the codes alone, or compare two sets."""
    if stats is not None:
        from movq_cli.commands.statistics import statistics

        statistics(stats, sets[0], request, arguments=sys.argv[1:], console=console)
        return
    from movq_cli.commands import evaluate as command

    if codes:
        command.codes(sets[0], request, console)
    elif len(sets) == 1:
        command.codebook(sets[0], request, console)
    else:
        command.evaluate(sets[0], sets[1], request, arguments=sys.argv[1:], console=console)
