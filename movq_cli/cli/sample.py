"""`movq sample`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from movq_cli.cli.options import BatchSize, DeviceName, Gpus, Json, Quiet, console_for


def sample(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder of the PNGs and their manifest.json, or a .zip or .npz file."),
    ],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Images.")] = 16,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Decoding steps. [default: the preset's, 8 or 12]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of image 0; image i has seed + i.")] = 0,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="CLASS",
            help="Class name or number, repeatable, taken in turn. [default: all in turn]",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Prior's run folder or .safetensors file. [default: the newest finished one]",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Run folder or .safetensors file. [default: beside the prior]", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of the codes' distribution, above 0. [default: the preset's, 1]", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Draw only among so many likeliest codes. [default: the preset's, all]", show_default=False
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw only among the likeliest codes of this share, above 0, at most 1. [default: the preset's, 1]",
            show_default=False,
        ),
    ] = None,
    choice_temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Of which codes are kept. [default: the preset's, 4.5]", show_default=False),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Classifier-free guidance; 0 = off, the paper's setting. [default: 0]",
            show_default=False,
        ),
    ] = None,
    guidance_schedule: Annotated[
        str | None,
        typer.Option(
            metavar="constant|linear",
            help="Guidance over the steps; linear = rising to the whole. [default: the preset's, constant]",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = 64,
    grid: Annotated[Path | None, typer.Option(help="Also make this picture of the first hundred.")] = None,
    device: DeviceName = None,
    gpus: Gpus = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw images from a prior. Run again, it makes only what is missing."""
    from movq_cli.commands import sample as command

    command.sample(
        out,
        n=n,
        run=run,
        tokenizer=tokenizer,
        seed=seed,
        classes=classes or (),
        asked={
            "steps": steps,
            "temperature": temperature,
            "choice_temperature": choice_temperature,
            "top_k": top_k,
            "top_p": top_p,
            "guidance": guidance,
            "guidance_schedule": guidance_schedule,
        },
        batch_size=batch_size,
        grid=grid,
        device=device,
        gpus=gpus,
        console=console_for(as_json, quiet),
    )
