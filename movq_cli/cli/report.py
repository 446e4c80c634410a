"""The options of `movq report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from movq_cli.cli.options import DeviceName, Json, Quiet, console_for, is_given
from movq_cli.data.output_files import PAGE
from movq_cli.errors import BadRequestError


def report(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN... [OUT.html]",
            help="Run folders, and the page to write; several runs are compared. [default page of one run: "
            "RUN/report.html]",
        ),
    ],
    models: Annotated[
        bool,
        typer.Option(
            "--models/--no-models",
            help="Load the weights of the run, for the parts about its codebook or samples; a comparison needs none.",
        ),
    ] = True,
    device_name: DeviceName = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one page about a run, or one that compares several: what it is, its curves, its pictures, its codes."""
    from movq_cli.commands import report as command

    folders, out = list(paths), None
    if paths[-1].suffix.lower() in PAGE.suffixes and not paths[-1].is_dir():
        out = folders.pop()
    if not folders:
        raise BadRequestError(f"{out} is the page to write, and no run is named", f"Name one: movq report RUN {out}")
    if out is None and len(folders) > 1:
        named = " ".join(map(str, folders))
        raise BadRequestError(
            "a page about several runs needs a name", f"Name it last: movq report {named} compared.html"
        )
    if len(folders) > 1 or not models:
        for name, option in (("models", "--models"), ("device_name", "--device")):
            if is_given(context, name) and (name != "models" or len(folders) > 1):
                raise BadRequestError(f"{option} has no effect without models", f"Leave {option} out.")
    command.report(
        folders,
        out or folders[0] / "report.html",
        with_models=models,
        device_name=device_name,
        console=console_for(as_json, quiet),
    )
