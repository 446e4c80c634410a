"""The options of `movq import` and `movq export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from movq_cli.cli.options import SIZE, Json, Quiet, console_for, image_size


def import_weights(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Weight file (.ckpt, .pt, .bin, .safetensors), folder of diffusers with a config.json, or "
            "hf://owner/name[@revision][/path].",
        ),
    ],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder to make.")],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Config of the model, YAML or JSON, with which the weights are compared. "
            "[default: the one beside the weights, if there is one]",
            show_default=False,
        ),
    ] = None,
    part: Annotated[
        Literal["first_stage", "cond_stage"] | None,
        typer.Option(
            "--part",
            help="Tokenizer to import from a file of a transformer or of a diffusion model. [default: first_stage]",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Literal["raw", "ema"],
        typer.Option("--weights", help="Import the weights themselves, or their running averages (ema)."),
    ] = "raw",
    image_range: Annotated[
        Literal["-1,1", "0,1"] | None,
        typer.Option(
            "--range",
            help="Range of the pixel values with which the tokenizer was trained. [default: that of its family]",
            show_default=False,
        ),
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(
            "--resolution",
            metavar=SIZE,
            help="Size of the training images, pixels. [default: that of the config, else 256]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a run folder of a public tokenizer: taming, latent-diffusion, MoVQGAN, diffusers, LlamaGen, MaskGIT."""
    from movq_cli.commands.import_weights import ImportRequest
    from movq_cli.commands.import_weights import import_weights as command
    from movq_cli.interop.importer import ImportOptions

    size = image_size(resolution, "--resolution", 1)
    options = ImportOptions(
        config=config,
        part=part,
        weights=weights,
        image_range=image_range,
        resolution=None if size is None else size.resolution,
    )
    command(ImportRequest(source, run, options), console_for(as_json, quiet))


def export(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run folder of the tokenizer, its .safetensors file, or hf://owner/name."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    to: Annotated[
        Literal["compvis", "diffusers", "safetensors", "onnx"],
        typer.Option(
            "--to",
            help="Format: compvis = checkpoint and config of taming, latent-diffusion or MoVQGAN; "
            "diffusers = folder of VQModel; safetensors = weight file of movq; onnx = two graphs.",
        ),
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a tokenizer in the format of another project, with its config and a model card."""
    from movq_cli.commands.export import ExportRequest
    from movq_cli.commands.export import export as command

    command(ExportRequest(run, out, to), console_for(as_json, quiet))
