"""The options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from movq_cli.console import Console
from movq_cli.errors import BadRequestError

PresetName = Annotated[
    str,
    typer.Option("--preset", "-p", help="Preset's name, or path of a .yaml file. `movq presets` lists them."),
]

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-o",
        metavar="NAME=VALUE",
        help="Another value for a setting, e.g. vq.codebook_size=2048. Repeatable.",
    ),
]

DataPath = Annotated[
    Path | None,
    typer.Option("--data", help="Prepared set. [default: the preset's data.path]", show_default=False),
]

DeviceName = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1 ... [default: cuda where there is one]", show_default=False),
]

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no log lines, only warnings and the result.")
]

Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=1,
        help="Start that many processes, one a GPU, as torchrun would. [default: one, or torchrun's]",
        show_default=False,
    ),
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only print parameters, steps, rates and memory; needs no data.")
]

BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images at once.")]

TokenizerRun = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Run folder or .safetensors file. [default: the newest finished one]",
        show_default=False,
    ),
]

WeightsFolder = Annotated[
    Path | None,
    typer.Option("--weights", help="Folder with the pretrained weights. [default: torch hub's]", show_default=False),
]


def console_for(as_json: bool, quiet: bool) -> Console:
    # Of the processes that torchrun starts, the first one speaks.
    return Console(as_json=as_json, quiet=quiet, mute=os.environ.get("RANK", "0") != "0")


def with_data_path(overrides: list[str] | None, data: Path | None) -> list[str]:
    # As a JSON string, which is YAML too: a path may hold anything.
    import json

    return [*(overrides or ()), *([] if data is None else [f"data.path={json.dumps(str(data))}"])]


def split_name(name: str | None) -> Any:  # noqa: ANN401 - a literal of the data layer, which is imported late
    if name not in {None, "train", "val"}:
        raise BadRequestError(f"--split {name!r} is neither train nor val")
    return name
