"""The options that several commands share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from movq_cli import signals
from movq_cli.console import Console
from movq_cli.data.output_files import OutputKind, require_name
from movq_cli.errors import BadRequestError
from movq_cli.image_size import ImageSize
from movq_cli.paths import expand_path

if TYPE_CHECKING:
    from movq_cli.run_manifest import Kind


def complete_preset_name(incomplete: str) -> list[str]:
    """Return the names of presets that begin with a text, for the completion of the shell."""
    from movq_cli import presets

    return [name for name in presets.available() if name.startswith(incomplete)]


PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        help="Name of a preset, or path of a .yaml file; `movq presets` lists the names. [default: with --from, the "
        "settings of that run]",
        autocompletion=complete_preset_name,
        show_default=False,
    ),
]

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-o",
        metavar="NAME=VALUE",
        help="Override one setting of the preset, for example vq.codebook_size=2048. Repeatable.",
    ),
]

DataPath = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of the prepared set. [default: the preset's data.path]", show_default=False),
]

DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device", help="Device: cpu, cuda, cuda:1 ... [default: cuda if available, else cpu]", show_default=False
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and the result.")]

Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=1,
        help="Number of processes to start, one for each GPU. [default: one, or those of torchrun]",
        show_default=False,
    ),
]

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only print the parameters, steps, hours, learning rate and memory of the run; needs no data."
    ),
]

BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Number of images in a batch.")]

TokenizerRun = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Run folder of the tokenizer, its .safetensors file, or hf://owner/name. "
        "[default: the newest finished run]",
        show_default=False,
    ),
]

WeightsOf = Annotated[
    Literal["last", "best"],
    typer.Option("--weights-of", help="Weights of a run folder: those of its last step, or of its best validation."),
]

WeightsFolder = Annotated[
    Path | None,
    typer.Option(
        "--weights", help="Folder of the pretrained weights. [default: the folder of torch.hub]", show_default=False
    ),
]


def console_for(as_json: bool, quiet: bool) -> Console:
    """Return the console of a command. Of the processes that torchrun starts, only the first one prints."""
    if quiet or not sys.stderr.isatty():  # huggingface_hub reads this when it is imported, which is later.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return Console(as_json=as_json, quiet=quiet, mute=not signals.is_first_rank())


def named_as(kind: OutputKind) -> Callable[[typer.CallbackParam, Path | None], Path | None]:
    """Return the callback of an option for a file to write, which refuses a name with the suffix of something else."""

    def check(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
        if path is None:
            return None
        require_name(expand_path(path), parameter.opts[0], kind)
        return path

    return check


def is_given(context: typer.Context, name: str) -> bool:
    """Return whether the user gave an option, which may have the value of its default.

    Args:
        context: Context of the command.
        name: Name of the parameter of the option.
    """
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


def refuse_unused(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Refuse options that the user gave although they have no effect.

    Args:
        context: Context of the command.
        names: Names of the parameters of the options.
        reason: When they have no effect, such as "with --table".

    Raises:
        BadRequestError: One of them was given.
    """
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        if is_given(context, name):
            raise BadRequestError(f"{flags[name]} has no effect {reason}", f"Leave {flags[name]} out.")


def with_setting(overrides: Sequence[str] | None, name: str, option: str, value: object) -> list[str]:
    """Return the overrides, with the value of an option as the override of the setting that it stands for.

    Args:
        overrides: Values of -o.
        name: Dotted name of the setting.
        option: Name of the option.
        value: Value of the option; None if it is not given.

    Raises:
        BadRequestError: An override gives the setting too.
    """
    import json

    overrides = list(overrides or ())
    if value is None:
        return overrides
    if any(override.partition("=")[0] == name for override in overrides):
        raise BadRequestError(f"{option} and -o {name} both give this setting", f"Leave {option} or -o {name} out.")
    # JSON is YAML too, and it quotes whatever characters a path contains.
    return [*overrides, f"{name}={json.dumps(value)}"]


def require_used_settings(overrides: Sequence[str] | None, used: Collection[str], command: str) -> None:
    """Refuse overrides of settings on which a command does not depend.

    Args:
        overrides: Values of -o.
        used: Names of the sections that the command uses.
        command: Name of the command, for the error.

    Raises:
        BadRequestError: A section is another one; whether the names exist is checked where they are read.
    """
    from movq_cli.presets import require_known_setting

    unused = {"vq", "prior", "views", "train_vq", "train_prior", "sample", "target"} - set(used)
    for override in overrides or ():
        setting = override.partition("=")[0]
        if setting.partition(".")[0] in unused:
            raise BadRequestError(f"-o {setting} has no effect on `movq {command}`", f"Leave -o {setting} out.")
        if setting and "=" in override:
            require_known_setting(setting, unused)


_LARGEST_SIDE = 2**14
"""Largest side of an image that an option can request, in pixels, as in the settings."""

SIZE = "SIDE|HEIGHTxWIDTH"
"""Metavar of an option for the size of images, which `image_size` reads."""


def image_size(text: str | None, option: str, smallest: int) -> ImageSize | None:
    """Return the size that is the value of an option: a side ("256"), or height and width ("192x256").

    Args:
        text: Value of the option; None if it is not given.
        option: Name of the option, for the error.
        smallest: Smallest side that the option allows, pixels.

    Raises:
        BadRequestError: The text is neither of the two, or a side is too small or too large.
    """
    if text is None:
        return None
    sides = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text.strip().lower(), re.ASCII)
    if sides is None:
        raise BadRequestError(
            f"{option} {text!r} is neither a side nor HEIGHTxWIDTH in pixels",
            f"Examples: {option} 256, {option} 192x256",
        )
    size = ImageSize(int(sides[1]), int(sides[2] or sides[1]))
    if not smallest <= min(size) <= max(size) <= _LARGEST_SIDE:
        raise BadRequestError(f"{option} {text!r} is not within {smallest} and {_LARGEST_SIDE} pixels a side")
    return size


def chosen_weights(run: Path | None, weights_of: str, kind: Kind) -> Path | None:
    """Return the run folder or weight file that a command gets, by the options for the run and for --weights-of."""
    if weights_of == "last":
        return run
    from movq_cli.runs import find_best

    return find_best(run, kind)


def split_name(name: str | None) -> Any:  # noqa: ANN401 - a literal of the data layer, which is imported late
    """Return the name of a split.

    Raises:
        BadRequestError: The name is not that of a split.
    """
    if name not in {None, "train", "val"}:
        raise BadRequestError(f"--split {name!r} is neither train nor val")
    return name
