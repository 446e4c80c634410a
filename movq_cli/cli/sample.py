"""The options of `movq sample`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from movq_cli.cli.options import (
    DeviceName,
    Gpus,
    Json,
    Quiet,
    WeightsFolder,
    WeightsOf,
    chosen_weights,
    console_for,
    named_as,
    refuse_unused,
    split_name,
)
from movq_cli.cli.setting_options import add_setting_options
from movq_cli.data.output_files import PICTURE
from movq_cli.errors import BadRequestError
from movq_cli.settings import SampleSettings

Output = Annotated[
    Path | None,
    typer.Argument(
        metavar="OUT",
        help="Folder for the PNG files and their manifest.json, or a .zip or .npz file; not with --tune.",
        show_default=False,
    ),
]

Number = Annotated[
    int | None,
    typer.Option(
        "--n",
        "-n",
        min=1,
        help="Number of images; with --tune, that of each trial. [default: 16, or 2000 with --tune]",
        show_default=False,
    ),
]

Seed = Annotated[
    int, typer.Option(min=0, max=2**31 - 1, help="Random seed of image 0; the seed of image i is this plus i.")
]

Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        metavar="CLASS",
        help="Name or index of a class. Repeatable: the images take the classes in turn. [default: all classes]",
        show_default=False,
    ),
]

PriorRun = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Run folder of the prior, its .safetensors file, or hf://owner/name. [default: the newest finished run]",
        show_default=False,
    ),
]

TokenizerOfPrior = Annotated[
    Path | None,
    typer.Option(
        help="Run folder of the tokenizer, its .safetensors file, or hf://owner/name. "
        "[default: the one in the prior's folder]",
        show_default=False,
    ),
]

BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        min=1,
        help="Number of images in a batch. It changes the images only by rounding: rarely a pixel by one level.",
    ),
]

Grid = Annotated[
    Path | None,
    typer.Option(callback=named_as(PICTURE), help="Also write this picture, a grid of the first hundred images."),
]


PresetSettings = Annotated[
    bool, typer.Option("--preset-settings", help="Ignore the settings that --tune has found for this prior.")
]

Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Search the settings with the lowest FID, or with --min-recall the highest precision, and store them "
        "beside the weights, where sampling finds them. Settings that are given stay fixed. Run the same command "
        "again to go on with a search.",
    ),
]

MinRecall = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="With --tune: search the highest precision of the settings whose recall is at least this, as "
        "`movq evaluate --prc` measures both. [default: the search is for the lowest FID]",
        show_default=False,
    ),
]

Budget = Annotated[
    int | None,
    typer.Option(min=1, help="Number of trials of --tune. [default: 30, or what --minutes allow]", show_default=False),
]

Minutes = Annotated[
    float | None,
    typer.Option(min=0, help="Minutes that --tune may take, about. [default: no limit]", show_default=False),
]

Against = Annotated[
    str | None,
    typer.Option(
        metavar="SET",
        help="Real images of --tune, or their statistics. [default: the prepared set of the run]",
        show_default=False,
    ),
]

Split = Annotated[str, typer.Option(help="Split of the real images of --tune: train or val.")]

_IMAGES, _TUNED_IMAGES, _TRIALS = 16, 2000, 30
"""Default numbers of images, of images of each trial of a search, and of its trials."""

_OF_TUNING = ("min_recall", "budget", "minutes", "against", "split", "weights")


@add_setting_options(SampleSettings, before="batch_size", elsewhere={"steps": "seed"})
def sample(
    context: typer.Context,
    settings: dict[str, Any],
    out: Output = None,
    n: Number = None,
    seed: Seed = 0,
    classes: Classes = None,
    run: PriorRun = None,
    weights_of: WeightsOf = "last",
    tokenizer: TokenizerOfPrior = None,
    batch_size: BatchSize = 64,
    grid: Grid = None,
    preset_settings: PresetSettings = False,
    tune: Tune = False,
    min_recall: MinRecall = None,
    budget: Budget = None,
    minutes: Minutes = None,
    against: Against = None,
    split: Split = "train",
    weights: WeightsFolder = None,
    device_name: DeviceName = None,
    gpus: Gpus = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sample images from a prior. Run the same command again to make the missing images."""
    if tune:
        refuse_unused(context, ("grid", "preset_settings", "gpus"), "with --tune")
        if out is not None:
            raise BadRequestError("OUT has no effect with --tune, which writes into the run folder", "Leave OUT out.")
    else:
        refuse_unused(context, _OF_TUNING, "without --tune")
        if out is None:
            raise BadRequestError("missing argument 'OUT': where to write the images", "See `movq sample --help`.")
    from movq_cli.commands import sample as command

    request = command.SampleRequest(
        out=out or Path(),
        n=n or (_TUNED_IMAGES if tune else _IMAGES),
        seed=seed,
        classes=tuple(classes or ()),
        run=chosen_weights(run, weights_of, "prior"),
        tokenizer=tokenizer,
        settings=settings,
        batch_size=batch_size,
        grid=grid,
        device_name=device_name,
        gpus=gpus,
        preset_settings=preset_settings,
    )
    console = console_for(as_json, quiet)
    if not tune:
        command.sample(request, arguments=sys.argv[1:], console=console)
        return
    from movq_cli.commands import tune as search

    budget = _TRIALS if budget is None and minutes is None else budget
    search.tune(search.TuneRequest(request, budget, minutes, against, split_name(split), weights, min_recall), console)
