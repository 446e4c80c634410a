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
    WeightsOf,
    add_setting_options,
    chosen_weights,
    console_for,
)
from movq_cli.settings import SampleSettings

Output = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Folder for the PNG files and their manifest.json, or a .zip or .npz file."),
]

Number = Annotated[int, typer.Option("--n", "-n", min=1, help="Number of images.")]

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

Grid = Annotated[Path | None, typer.Option(help="Also write this picture, a grid of the first hundred images.")]


@add_setting_options(SampleSettings, before="batch_size", elsewhere={"steps": "seed"})
def sample(
    out: Output,
    settings: dict[str, Any],
    n: Number = 16,
    seed: Seed = 0,
    classes: Classes = None,
    run: PriorRun = None,
    weights_of: WeightsOf = "last",
    tokenizer: TokenizerOfPrior = None,
    batch_size: BatchSize = 64,
    grid: Grid = None,
    device_name: DeviceName = None,
    gpus: Gpus = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sample images from a prior. Run the same command again to make the missing images."""
    from movq_cli.commands import sample as command

    request = command.SampleRequest(
        out=out,
        n=n,
        seed=seed,
        classes=tuple(classes or ()),
        run=chosen_weights(run, weights_of, "prior"),
        tokenizer=tokenizer,
        settings=settings,
        batch_size=batch_size,
        grid=grid,
        device_name=device_name,
        gpus=gpus,
    )
    command.sample(request, arguments=sys.argv[1:], console=console_for(as_json, quiet))
