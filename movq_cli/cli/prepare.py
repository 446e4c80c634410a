"""The options of `movq prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from movq_cli.cli.colors import Background, color
from movq_cli.cli.options import SIZE, Json, Quiet, console_for, image_size, is_given, refuse_unused
from movq_cli.cores import allowed_cores
from movq_cli.data.filters import FILTER, FILTERS
from movq_cli.errors import BadRequestError, did_you_mean
from movq_cli.image_size import Resolution

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Images: a folder (class folders give labels), zip, tar, parquet, folder of these, "
        "'train-{0000..0009}.tar' (WebDataset), .npz of pixels, list of images (.txt), image, or name of a data set: "
        "digits, cifar10 ...",
    ),
]

Output = Annotated[
    Path | None,
    typer.Argument(
        metavar="OUT",
        help="Folder of the prepared set [default: data/NAME]; with --show, the picture. [default: SET.png]",
        show_default=False,
    ),
]

Size = Annotated[
    str | None,
    typer.Option(
        metavar=SIZE,
        help="Short side of the stored images in pixels, or the size to which all are resized and cropped; smaller "
        "images are rejected. [default: their own short side, at most 256]",
        show_default=False,
    ),
]

Square = Annotated[bool, typer.Option("--square", help="Cut out the central square after resizing to a short side.")]

Val = Annotated[
    str,
    typer.Option(
        help="Held-out images, if SRC has no split of its own: a share (0.1), a number (500), or nvidia "
        "(FFHQ's images from 60000 on)."
    ),
]

ValList = Annotated[
    Path | None, typer.Option(help="File with the names or paths of the held-out images, one in each line.")
]

ValLabels = Annotated[
    Path | None, typer.Option(help="File with the classes of a val folder without class folders, as ImageNet has.")
]

Upscale = Annotated[bool, typer.Option("--upscale", help="Enlarge smaller images instead of rejecting them.")]

Filter = Annotated[
    str,
    typer.Option(
        "--filter",
        metavar="|".join(FILTERS),
        help="Filter of the resize, which changes FID by as much as a point. vqgan is that of VQGAN's code: bilinear "
        "without antialiasing.",
    ),
]

Labels = Annotated[bool, typer.Option("--labels/--no-labels", help="Store the classes of the images.")]

Orientation = Annotated[
    bool, typer.Option("--orientation/--no-orientation", help="Turn images upright as their EXIF data says.")
]

Compression = Annotated[
    str,
    typer.Option(
        help="Compression of the stored PNGs: none loads 3 to 5 times as fast, zlib takes two thirds of the space."
    ),
]

MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Reject images with more pixels. An image that is decoded takes up to 16 bytes of memory a pixel in each "
        "worker. [default: 134217728]",
        show_default=False,
    ),
]

White = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=65535,
        help="Value of white in gray images of 16 bits: 4095 for values of 12 bits. [default: 65535]",
        show_default=False,
    ),
]

Workers = Annotated[
    int | None, typer.Option(min=0, help="Number of processes. [default: one per core]", show_default=False)
]

DropDuplicates = Annotated[
    bool, typer.Option("--drop-duplicates", help="Of equal image files, store only the first by name.")
]

Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Make one N-th of the set, beside N - 1 other jobs with the same OUT; I from 0 or from 1. "
        "[default: the complete set]",
        show_default=False,
    ),
]

Check = Annotated[bool, typer.Option("--check", help="SRC is a prepared set: verify every byte of it.")]

Show = Annotated[bool, typer.Option("--show", help="SRC is a prepared set: make a contact sheet of it.")]


def prepare(
    source: Source,
    context: typer.Context,
    out: Output = None,
    size: Size = None,
    square: Square = False,
    val: Val = "0.1",
    val_list: ValList = None,
    val_labels: ValLabels = None,
    upscale: Upscale = False,
    filter_name: Filter = FILTER,
    background: Background = "255,255,255",
    labels: Labels = True,
    orientation: Orientation = True,
    compression: Compression = "none",
    max_pixels: MaxPixels = None,
    white: White = None,
    workers: Workers = None,
    drop_duplicates: DropDuplicates = False,
    shard: Shard = None,
    check: Check = False,
    show: Show = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a prepared set: decode, resize and split images once, in a form that training reads quickly.

    Values of pixels are taken as stored: color profiles are not applied. Gray images of 16 bits are scaled to 8 bits.
    """
    if check and (show or out is not None):
        raise BadRequestError(
            "--check takes the path of a prepared set only", "Example: movq prepare --check data/ffhq"
        )
    _refuse_unused(context, check=check, show=show)
    if check or show:
        from movq_cli.commands import prepared

        console = console_for(as_json, quiet)
        if show:
            prepared.show(Path(source), out, console=console)
        else:
            prepared.check(Path(source), workers=_worker_count(workers), console=console)
        return
    from movq_cli.commands import prepare as command
    from movq_cli.commands.prepare_plan import Preprocessing

    resolution, is_square = _resolution(size, is_square=square)
    given = {"max_pixels": max_pixels, "white": white}
    limits = {name: value for name, value in given.items() if value is not None}
    request = command.PrepareRequest(
        source,
        out or Path("data") / Path(source).resolve().stem.removesuffix(".tar"),
        Preprocessing(
            resolution,
            is_square,
            upscale,
            color(background, "--background"),
            orientation,
            _compression(compression),
            filter=_filter(filter_name),
            **limits,
        ),
        val=val,
        val_list=val_list,
        val_labels=val_labels,
        keep_labels=labels,
        drop_duplicates=drop_duplicates,
        workers=_worker_count(workers),
        shard=None if shard is None else _job(shard),
    )
    command.prepare(request, console_for(as_json, quiet))


def _refuse_unused(context: typer.Context, *, check: bool, show: bool) -> None:
    """Refuse options that have no effect beside others.

    Args:
        context: Context of the command.
        check: Whether a prepared set is verified.
        show: Whether a contact sheet of a prepared set is made.

    Raises:
        BadRequestError: Such an option is given.
    """
    if check or show:
        used = {"source", "out", "check", "show", "as_json", "quiet", *(() if show else ("workers",))}
        names = [parameter.name for parameter in context.command.params if parameter.name is not None]
        refuse_unused(context, [name for name in names if name not in used], "with --show" if show else "with --check")
        return
    if not is_given(context, "size"):
        refuse_unused(context, ("upscale",), "without --size")
    if is_given(context, "val_list"):
        refuse_unused(context, ("val",), "beside --val-list")
    if context.params["labels"] is False:
        refuse_unused(context, ("val_labels",), "beside --no-labels")


def _resolution(text: str | None, *, is_square: bool) -> tuple[Resolution | None, bool]:
    """Return the size of the stored images, and whether it is that of a square to cut out.

    Args:
        text: Value of --size.
        is_square: Value of --square.
    """
    size = image_size(text, "--size", 8)
    if size is None or text is None:
        return None, is_square
    if is_square and not size.is_square:
        raise BadRequestError(f"--square cuts out squares, but --size {text} is none", "Leave --square out.")
    return size.resolution, is_square or (size.is_square and "x" in text.lower())


def _filter(name: str) -> str:
    if name not in FILTERS:
        raise BadRequestError(f"--filter {name!r} is no filter", did_you_mean(name, FILTERS))
    return name


def _worker_count(workers: int | None) -> int:
    return allowed_cores() if workers is None else workers


def _job(text: str) -> tuple[int, int]:
    """Return the number of a job and the number of jobs."""
    job, _, jobs = text.partition("/")
    if not (job.isdecimal() and jobs.isdecimal() and int(job) <= int(jobs) > 0):
        message = f"--shard {text!r} is not the number of a job, a slash and the number of jobs"
        raise BadRequestError(message, "Example: --shard 3/8")
    return int(job), int(jobs)


def _compression(name: str) -> Any:  # noqa: ANN401 - a literal of the data layer, which is imported late
    if name not in {"none", "zlib"}:
        raise BadRequestError(f"--compression {name!r} is neither none nor zlib")
    return name
