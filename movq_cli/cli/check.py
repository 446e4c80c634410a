"""The options of `movq check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from movq_cli.cli.options import Json, Quiet, console_for
from movq_cli.cores import allowed_cores


def check(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Run folder, prepared set, code cache, feature cache, samples, a single file of these, or a folder "
            "that contains such folders.",
        ),
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare all files with the digests that were written with them, and name each damaged file with its remedy."""
    from movq_cli.commands import check as command

    command.check(path, workers=allowed_cores(), console=console_for(as_json, quiet))
