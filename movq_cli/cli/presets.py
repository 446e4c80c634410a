"""The options of `movq presets`."""

from __future__ import annotations

from typing import Annotated

import typer

from movq_cli.cli.options import Json, Overrides, complete_preset_name
from movq_cli.console import Console


def presets(context: typer.Context, as_json: Json = False) -> None:
    """List the presets with the published values that they should reproduce."""
    from movq_cli.commands import presets as command

    if context.invoked_subcommand is None:
        command.list_presets(Console(as_json=as_json))


def presets_show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Name of a preset, or path of a .yaml file.",
            autocompletion=complete_preset_name,
        ),
    ],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Print all settings of one preset, with those that it inherits, as YAML that can be loaded again."""
    from movq_cli.commands import presets as command

    command.show_preset(name, overrides or (), Console(as_json=as_json))
