"""The options of `movq reconstruct`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from movq_cli.cli.options import (
    SIZE,
    BatchSize,
    DeviceName,
    Json,
    Quiet,
    TokenizerRun,
    WeightsFolder,
    WeightsOf,
    chosen_weights,
    console_for,
    image_size,
    is_given,
    named_as,
    refuse_unused,
    split_name,
)
from movq_cli.cli.setting_options import setting_option
from movq_cli.data.output_files import PICTURE
from movq_cli.errors import BadRequestError
from movq_cli.settings import SampleSettings

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Images: a folder, zip, tar, image, prepared set or name of a data set; or a folder of code maps.",
    ),
]

Output = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the PNG files.")]

Split = Annotated[
    str | None,
    typer.Option(help="Split of a source that has splits: train or val. [default: all images]", show_default=False),
]

Crop = Annotated[
    str | None,
    typer.Option(
        metavar=SIZE,
        help="Reconstruct the central squares of this side, or rectangles of this size, in pixels, after resizing "
        "images to the smallest size that covers them. [default: images as they are]",
        show_default=False,
    ),
]

Grid = Annotated[
    Path | None,
    typer.Option(
        callback=named_as(PICTURE),
        help="Also write this picture: evenly spaced originals, above their reconstructions.",
    ),
]

MaskRatio = Annotated[
    float | None,
    typer.Option(
        "--mask-ratio", min=0, max=1, help="Hide this share of the codes and let a masked prior fill them in."
    ),
]

Mask = Annotated[
    Path | None,
    typer.Option(
        "--mask", help="Picture whose white pixels mark what a masked prior fills in; transparent ones do not."
    ),
]

Top1 = Annotated[
    bool, typer.Option("--top1", help="Fill in the most likely codes in one step, instead of drawing them.")
]

Samples = Annotated[int, typer.Option("--samples", min=1, help="Number of fillings to draw for each image.")]

Steps = Annotated[int | None, setting_option(SampleSettings, "steps")]

Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Random seed of the first filling of the first image.")]

Prior = Annotated[
    Path | None,
    typer.Option(
        "--prior",
        help="Run folder of the masked prior that fills in, its .safetensors file, or hf://owner/name. "
        "[default: the newest finished run]",
        show_default=False,
    ),
]

Figure = Annotated[
    Path | None,
    typer.Option(
        "--figure",
        callback=named_as(PICTURE),
        help="Also write this picture, after figure A.1: fillings at mask ratios from 100% to 20%.",
    ),
]

Metrics = Annotated[
    bool,
    typer.Option("--metrics", help="Also compute the mean PSNR (dB) and SSIM, and LPIPS if its weights are available."),
]

Codes = Annotated[
    Path | None,
    typer.Option("--codes", help="Also write the code maps to this folder: .npy files, uint16 [h, w, c]."),
]


SourceNames = Annotated[
    bool,
    typer.Option(
        "--source-names", help="Name the images of a prepared set as in the source from which the set was made."
    ),
]


def reconstruct(
    source: Source,
    out: Output,
    context: typer.Context,
    run: TokenizerRun = None,
    weights_of: WeightsOf = "last",
    split: Split = None,
    crop: Crop = None,
    batch_size: BatchSize = 16,
    grid: Grid = None,
    mask_ratio: MaskRatio = None,
    mask: Mask = None,
    top1: Top1 = False,
    samples: Samples = 1,
    steps: Steps = None,
    seed: Seed = 0,
    prior: Prior = None,
    figure: Figure = None,
    metrics: Metrics = False,
    codes: Codes = None,
    source_names: SourceNames = False,
    weights: WeightsFolder = None,
    device_name: DeviceName = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Encode and decode images with a tokenizer, to PNG files of the same names and sizes."""
    console = console_for(as_json, quiet)
    if _is_filling(context, mask_ratio, mask):
        from movq_cli.commands import fill

        filling = fill.FillRequest(
            source=source,
            out=out,
            prior=chosen_weights(prior, weights_of, "prior"),
            split=split_name(split),
            ratio=mask_ratio,
            picture=mask,
            top1=top1,
            samples=samples,
            steps=steps,
            seed=seed,
            figure=figure,
            device_name=device_name,
        )
        fill.fill(filling, console)
        return
    from movq_cli.commands import reconstruct as command

    request = command.ReconstructRequest(
        source=source,
        out=out,
        run=chosen_weights(run, weights_of, "vq"),
        split=split_name(split),
        crop=image_size(crop, "--crop", 8),
        batch_size=batch_size,
        grid=grid,
        metrics=metrics,
        codes=codes,
        source_names=source_names,
        weights=weights,
        device_name=device_name,
        requires_batches=is_given(context, "batch_size"),
    )
    command.reconstruct(request, console)


def _is_filling(context: typer.Context, ratio: float | None, mask: Path | None) -> bool:
    """Return whether codes are hidden and filled in.

    Args:
        context: Context of the command.
        ratio: Value of --mask-ratio.
        mask: Value of --mask.

    Raises:
        BadRequestError: The options exclude each other, or one has no effect.
    """
    if ratio is None and mask is None:
        if any(is_given(context, name) for name in ("figure", "prior", "top1", "samples", "steps")):
            options = "--figure, --prior, --top1, --samples and --steps"
            raise BadRequestError(f"{options} need --mask-ratio or --mask", "Add one of these.")
        refuse_unused(context, ("seed",), "without --mask-ratio or --mask")
        if not is_given(context, "metrics"):
            refuse_unused(context, ("weights",), "without --metrics")
        return False
    if ratio is not None and mask is not None:
        raise BadRequestError("--mask-ratio and --mask both say what is hidden", "Give one of them.")
    without_mask = ("run", "crop", "batch_size", "grid", "metrics", "codes", "source_names", "weights")
    refuse_unused(context, without_mask, "with --mask-ratio or --mask")
    if is_given(context, "top1"):
        refuse_unused(context, ("steps", "samples"), "with --top1")
        if mask is not None and not is_given(context, "figure"):
            refuse_unused(context, ("seed",), "with --top1 and --mask: nothing is drawn")
    return True
