"""`movq evaluate`: its options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from movq_cli.cli.options import (
    BatchSize,
    DeviceName,
    Gpus,
    Json,
    Quiet,
    TokenizerRun,
    WeightsFolder,
    console_for,
    split_name,
)
from movq_cli.errors import BadRequestError


def evaluate(
    sets: Annotated[
        list[str],
        typer.Argument(
            metavar="REAL FAKE",
            help="Originals, then reconstructions or samples: folder, zip, tar, prepared set, .npz of pixels; REAL may "
            "be statistics. One set for --stats and --codebook, JSON files for --table.",
            show_default=False,
        ),
    ],
    fid: Annotated[bool, typer.Option("--fid", help="Frechet Inception distance, lower is better.")] = False,
    isc: Annotated[bool, typer.Option("--is", help="Inception Score of FAKE, higher is better.")] = False,
    kid: Annotated[bool, typer.Option("--kid", help="Kernel Inception distance, lower is better.")] = False,
    prc: Annotated[bool, typer.Option("--prc", help="Precision and recall, 0 to 1, by Inception.")] = False,
    prc_vgg: Annotated[bool, typer.Option("--prc-vgg", help="The same by VGG-16, StyleGAN's convention.")] = False,
    psnr: Annotated[bool, typer.Option("--psnr", help="PSNR of pairs of the same name, dB.")] = False,
    ssim: Annotated[bool, typer.Option("--ssim", help="SSIM of pairs of the same name.")] = False,
    lpips: Annotated[bool, typer.Option("--lpips", help="LPIPS of pairs of the same name, lower is better.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every figure that the inputs allow; fetches weights that are missing.")
    ] = False,
    codebook: Annotated[
        bool, typer.Option("--codebook", help="Usage and perplexity of a tokenizer's codebook on REAL.")
    ] = False,
    copies: Annotated[
        Path | None,
        typer.Option("--copies", help="Look for copies of REAL in FAKE, and make this picture of the nearest."),
    ] = None,
    stats: Annotated[
        str | None,
        typer.Option("--stats", help="Write REAL's statistics to this .npz, or keep them under this name."),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Print JSON files side by side, as Markdown.")] = False,
    split: Annotated[str, typer.Option(help="train or val: of a prepared set.")] = "val",
    crop: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Compare central squares of so many pixels, short sides resized to it. [default: images as they are]",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End at a corrupt image, not leave it out.")] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", "-p", help="Show this preset's published figures beside. [default: none]", show_default=False
        ),
    ] = None,
    run: TokenizerRun = None,
    weights: WeightsFolder = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Where features are kept. [default: ~/.cache/movq]", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write the figures and their protocol to this JSON file."),
    ] = None,
    batch_size: BatchSize = 32,
    device: DeviceName = None,
    gpus: Gpus = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure FAKE against REAL; without a figure named, all that the inputs and weights allow."""
    figures = {"psnr": psnr, "ssim": ssim, "lpips": lpips, "fid": fid, "isc": isc, "kid": kid}
    figures |= {"prc": prc, "prc_vgg": prc_vgg}
    named = tuple(name for name, wanted in figures.items() if wanted)
    console = console_for(as_json, quiet)
    one = stats is not None or (len(sets) == 1 and codebook and not named and not every and copies is None)
    if not table and len(sets) != (1 if one else 2):
        wanted = "--stats takes one set" if one else "two sets are compared, REAL and FAKE"
        raise BadRequestError(f"{wanted}, not {len(sets)} ({', '.join(sets)})", "See `movq evaluate --help`.")
    if table:
        from movq_cli.commands.evaluation_table import tabulate

        tabulate(sets, console)
        return
    from movq_cli.evaluation.comparison import EvaluationRequest

    asked = EvaluationRequest(
        metrics=named,
        insist=bool(named) or every,
        copies=copies,
        codebook=codebook,
        run=run,
        split=split_name(split),
        crop=crop,
        strict=strict,
        batch_size=batch_size,
        weights=weights,
        cache=cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "movq",
        preset=preset,
        device=device,
        gpus=gpus,
        out=out,
    )
    if stats is not None:
        from movq_cli.commands.statistics import statistics

        statistics(stats, sets[0], asked, console)
        return
    from movq_cli.commands import evaluate as command

    if len(sets) == 1:
        command.codebook(sets[0], asked, console)
    else:
        command.evaluate(sets[0], sets[1], asked, console)
