"""The options of `movq weights`."""

from __future__ import annotations

from typing import Annotated

import typer

from movq_cli.cli.options import Json, Quiet, WeightsFolder, console_for


def weights(
    folder: WeightsFolder = None,
    fetch: Annotated[
        bool,
        typer.Option("--fetch", help="Download missing files, into the folder of --weights if one is given."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the pretrained networks (Inception, VGG-16, AlexNet) and whether their weights are available."""
    from movq_cli.commands.weights import show_weights

    show_weights(folder, fetch=fetch, console=console_for(as_json, quiet))
