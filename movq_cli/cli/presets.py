"""The options of `movq presets`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from movq_cli.cli.options import (
    DeviceName,
    Json,
    Overrides,
    Quiet,
    WeightsFolder,
    complete_preset_name,
    console_for,
    refuse_unused,
)
from movq_cli.console import Console


def presets(context: typer.Context, as_json: Json = False) -> None:
    """List the presets with the published values that they should reproduce."""
    from movq_cli.commands import presets as command

    if context.invoked_subcommand is None:
        command.list_presets(Console(as_json=as_json))
    else:
        refuse_unused(context, ("as_json",), f"before {context.invoked_subcommand}; it is an option of that command")


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


def presets_new(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Preset to write, a .yaml file.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of the prepared set.")],
    hours: Annotated[float, typer.Option("--hours", min=0.01, help="Hours for both stages together.")] = 8.0,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            min=0.5,
            help="Memory in GiB that a training may use. [default: what the device has]",
            show_default=False,
        ),
    ] = None,
    weights: WeightsFolder = None,
    device_name: DeviceName = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a preset for own images: sizes, batches and steps that suit the set, the device and the hours."""
    from movq_cli.commands import new_preset as command

    request = command.NewPresetRequest(path, data, hours, memory, device_name, weights, force)
    command.new_preset(request, console_for(as_json, quiet))
