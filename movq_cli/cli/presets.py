"""`movq presets`: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from movq_cli.cli.options import Json, Overrides
from movq_cli.console import Console


def presets(context: typer.Context, as_json: Json = False) -> None:
    """List the presets with the published figures that they are held against."""
    from movq_cli.commands import presets as command

    if context.invoked_subcommand is None:
        command.list_presets(Console(as_json=as_json))


def presets_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Preset's name, or path of a .yaml file.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Print one preset with everything that it inherits, as YAML that loads again."""
    from movq_cli.commands import presets as command

    command.show_preset(name, overrides or (), Console(as_json=as_json))
