"""`movq weights`: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from movq_cli.cli.options import Json, Quiet, WeightsFolder, console_for


def weights(
    folder: WeightsFolder = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download what is missing, into the folder of --weights where one is given.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which pretrained networks are here (Inception, VGG, AlexNet), where they are looked for, and fetch them."""
    from movq_cli.commands.weights import show_weights

    show_weights(folder, fetch=fetch, console=console_for(as_json, quiet))
