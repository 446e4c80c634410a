"""`movq prepare`: its options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from movq_cli.cli.options import Json, Quiet, console_for
from movq_cli.errors import BadRequestError


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder (class folders give labels), zip, tar, folder of tars, 'train-{0000..0009}.tar' (WebDataset), "
            "list of images (.txt), image, or a set's name: digits, cifar10 ...",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="The prepared set's folder, [default: data/NAME], or --show's picture. [default: SET.png]",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Short side, pixels; smaller images are left out. [default: own size, at most 256]",
            show_default=False,
        ),
    ] = None,
    square: Annotated[bool, typer.Option("--square", help="Cut to the central square after resizing.")] = False,
    val: Annotated[
        str,
        typer.Option(
            help="Held-out images: a share (0.1), a count (500), or nvidia (FFHQ from 60000 on), "
            "unless SRC has its own split."
        ),
    ] = "0.1",
    val_list: Annotated[
        Path | None, typer.Option(help="File with the names of the held-out images, one a line.")
    ] = None,
    val_labels: Annotated[
        Path | None, typer.Option(help="File with the classes of a flat val folder, as ImageNet has one.")
    ] = None,
    upscale: Annotated[bool, typer.Option("--upscale", help="Enlarge smaller images, not leave them out.")] = False,
    background: Annotated[str, typer.Option(help="RGB below transparent pixels, each 0 to 255.")] = "255,255,255",
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Take class folders as labels.")] = True,
    orientation: Annotated[
        bool, typer.Option("--orientation/--no-orientation", help="Turn images upright as their EXIF says.")
    ] = True,
    compression: Annotated[
        str,
        typer.Option(help="Of the stored PNGs: none loads 3 to 5 times as fast, zlib takes two thirds of the space."),
    ] = "none",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes. [default: one a core]", show_default=False)
    ] = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Of images that are the same file, keep the first by name.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Make one N-th of the set, with N - 1 others in the same folder; I from 0 or from 1. [default: all]",
            show_default=False,
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="SRC is a prepared set: verify every byte of it.")] = False,
    show: Annotated[bool, typer.Option("--show", help="SRC is a prepared set: make a contact sheet of it.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a prepared set: images decoded, resized and split once, for training to read."""
    if check and (show or out is not None):
        raise BadRequestError("--check takes a prepared set alone", "Example: movq prepare --check data/ffhq")
    if check or show:
        from movq_cli.commands import prepared

        console = console_for(as_json, quiet)
        if show:
            prepared.show(Path(source), out, console=console)
        else:
            prepared.check(Path(source), workers=_cores(workers), console=console)
        return
    from movq_cli.commands import prepare as command

    command.prepare(
        source,
        out or Path("data") / Path(source).resolve().stem.removesuffix(".tar"),
        size=size,
        square=square,
        val=val,
        val_list=val_list,
        upscale=upscale,
        background=_color(background),
        labels=labels,
        orientation=orientation,
        workers=_cores(workers),
        console=console_for(as_json, quiet),
        compression=_compression(compression),
        shard=None if shard is None else _part(shard),
        drop_duplicates=drop_duplicates,
        val_labels=val_labels,
    )


def _color(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) < 256 for part in parts):
        raise BadRequestError(
            f"--background {text!r} is not three numbers from 0 to 255", "Example: --background 0,0,0"
        )
    red, green, blue = map(int, parts)
    return red, green, blue


def _cores(workers: int | None) -> int:
    return (os.cpu_count() or 1) if workers is None else workers


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) <= int(parts) > 0):
        raise BadRequestError(f"--shard {text!r} is not a job's number of so many", "Example: --shard 3/8")
    return int(number), int(parts)


def _compression(name: str) -> Any:  # noqa: ANN401 - a literal of the data layer, which is imported late
    if name not in {"none", "zlib"}:
        raise BadRequestError(f"--compression {name!r} is neither none nor zlib")
    return name
