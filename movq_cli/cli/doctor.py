"""The options of `movq doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from movq_cli.cli.options import Json, console_for

_FINDINGS = 3
"""Exit code if something is wrong with the run."""


def doctor(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    as_json: Json = False,
) -> None:
    """Name what is wrong with a run, with the evidence and a command as the remedy; exit code 3 with findings."""
    from movq_cli.commands import doctor as command

    if not command.doctor(run, console_for(as_json, quiet=False)):
        raise typer.Exit(_FINDINGS)
