"""`movq reconstruct`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from movq_cli.cli.options import (
    BatchSize,
    DeviceName,
    Json,
    Quiet,
    TokenizerRun,
    WeightsFolder,
    console_for,
    split_name,
)
from movq_cli.errors import BadRequestError


def reconstruct(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Folder, zip, tar, image, prepared set, a set's name, or a folder of code maps."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the PNGs.")],
    run: TokenizerRun = None,
    split: Annotated[
        str | None,
        typer.Option(help="train or val, of a source with splits. [default: all]", show_default=False),
    ] = None,
    batch_size: BatchSize = 16,
    grid: Annotated[
        Path | None,
        typer.Option(help="Also make this picture: originals, evenly spaced, over their reconstructions."),
    ] = None,
    mask_ratio: Annotated[
        float | None,
        typer.Option("--mask-ratio", min=0, max=1, help="Hide this share of the codes, and fill it in."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Picture: a masked prior fills in what is white in it.")
    ] = None,
    top1: Annotated[bool, typer.Option("--top1", help="Fill with the likeliest codes, in one step.")] = False,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Fillings drawn of each image.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Decoding steps of a filling. [default: the prior's]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the first filling.")] = 0,
    prior: Annotated[
        Path | None,
        typer.Option(
            "--prior",
            help="That fills in: run folder or .safetensors file. [default: the newest finished one]",
            show_default=False,
        ),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", help="Also make this picture after figure A.1: fillings at ratios from 100% to 20%."),
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Also give mean PSNR (dB) and SSIM, and LPIPS where its weights are.")
    ] = False,
    codes: Annotated[
        Path | None, typer.Option("--codes", help="Also write the code maps here: .npy, uint16 [h, w, c].")
    ] = None,
    weights: WeightsFolder = None,
    device: DeviceName = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pass images through a tokenizer and back, to PNGs of the same names and sizes."""
    if mask_ratio is not None or mask is not None:
        from movq_cli.commands import fill

        _refuse_beside_masks(mask_ratio, mask, {"--run": run, "--grid": grid, "--metrics": metrics, "--codes": codes})
        filling = fill.Filling(mask_ratio, mask, top1, 1 if top1 else samples, steps, seed, figure)
        fill.fill(
            source,
            out,
            filling,
            prior=prior,
            split=split_name(split),
            device=device,
            console=console_for(as_json, quiet),
        )
        return
    if figure is not None or prior is not None or top1 or samples > 1 or steps is not None:
        raise BadRequestError(
            "--figure, --prior, --top1, --samples and --steps go with --mask-ratio or --mask", "Give one of these."
        )
    from movq_cli.commands import reconstruct as command

    command.reconstruct(
        source,
        out,
        run=run,
        split=split_name(split),
        batch_size=batch_size,
        grid=grid,
        metrics=metrics,
        codes=codes,
        weights=weights,
        device=device,
        console=console_for(as_json, quiet),
    )


def _refuse_beside_masks(ratio: float | None, mask: Path | None, others: dict[str, object]) -> None:
    if ratio is not None and mask is not None:
        raise BadRequestError("--mask-ratio and --mask both say what is hidden", "Give one of them.")
    given = [name for name, value in others.items() if value]
    if given:
        raise BadRequestError(f"{given[0]} does not go with --mask-ratio or --mask", "Leave it out.")
