"""The command line: declares the commands, and turns errors into one line and an exit code.

Nothing else touches Typer, and nothing here imports torch: each command imports its own when it is called.
Exit codes: 0 done, 1 failed, 2 a bad request, 130 interrupted with what was made so far kept.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from movq_cli import __version__
from movq_cli.console import Console
from movq_cli.errors import BadRequestError, FailureError, MovqError

app = typer.Typer(
    name="movq",
    help="Train and run MoVQ: a modulated VQ image tokenizer and a prior that draws an image in 8 steps.",
    epilog="In order: prepare, train-vq, train-prior, sample, evaluate. Each goes on where it was stopped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
presets_app = typer.Typer(help="List the presets, or show one.", rich_markup_mode=None)
app.add_typer(presets_app, name="presets", invoke_without_command=True)

Preset = Annotated[
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
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Prepared set. [default: the preset's data.path]", show_default=False),
]
Device = Annotated[
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
VQRun = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Run folder or .safetensors file. [default: the newest finished one]",
        show_default=False,
    ),
]

Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="Folder with the pretrained weights. [default: torch hub's]", show_default=False),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"movq {__version__}")
        raise typer.Exit


@app.command()
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

        console = _console(as_json, quiet)
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
        console=_console(as_json, quiet),
        compression=_compression(compression),
        shard=None if shard is None else _part(shard),
        drop_duplicates=drop_duplicates,
        val_labels=val_labels,
    )


@app.command("train-vq")
def train_vq(
    preset: Preset,
    data: Data = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Run folder. [default: runs/PRESET-vq]", show_default=False)
    ] = None,
    overrides: Overrides = None,
    weights: Weights = None,
    device: Device = None,
    gpus: Gpus = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a tokenizer (stage 1). Run again, it goes on from its last checkpoint."""
    from movq_cli.commands import train_vq as command

    command.train_vq(
        preset=preset,
        overrides=_overrides(overrides, data),
        run=run,
        device=device,
        gpus=gpus,
        weights=weights,
        dry_run=dry_run,
        console=_console(as_json, quiet),
    )


@app.command("train-prior")
def train_prior(
    preset: Preset,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            help="Run folder of train-vq. [default: the newest finished one of these vq settings]",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="mask (in parallel steps), auto (code by code) or depth. [default: the preset's, mask]",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Run folder. [default: runs/PRESET-prior, or -auto, -depth]", show_default=False),
    ] = None,
    overrides: Overrides = None,
    weights: Weights = None,
    device: Device = None,
    gpus: Gpus = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a prior (stage 2) on a tokenizer's codes. Run again, it goes on from its last checkpoint."""
    from movq_cli.commands import train_prior as command

    command.train_prior(
        preset=preset,
        overrides=[*_overrides(overrides, data), *([] if mode is None else [f"prior.mode={mode}"])],
        tokenizer=tokenizer,
        run=run,
        device=device,
        gpus=gpus,
        weights=weights,
        dry_run=dry_run,
        console=_console(as_json, quiet),
    )


@app.command()
def reconstruct(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Folder, zip, tar, image, prepared set, a set's name, or a folder of code maps."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the PNGs.")],
    run: VQRun = None,
    split: Annotated[
        str | None,
        typer.Option(help="train or val, of a source with splits. [default: all]", show_default=False),
    ] = None,
    batch_size: BatchSize = 16,
    grid: Annotated[
        Path | None,
        typer.Option(help="Also make this picture: originals, evenly spaced, over their reconstructions."),
    ] = None,
    mask_ratio: Annotated[
        float | None,
        typer.Option("--mask-ratio", min=0, max=1, help="Hide this share of the codes, and fill it in."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Picture: a masked prior fills in what is white in it.")
    ] = None,
    top1: Annotated[bool, typer.Option("--top1", help="Fill with the likeliest codes, in one step.")] = False,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Fillings drawn of each image.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Decoding steps of a filling. [default: the prior's]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the first filling.")] = 0,
    prior: Annotated[
        Path | None,
        typer.Option(
            "--prior",
            help="That fills in: run folder or .safetensors file. [default: the newest finished one]",
            show_default=False,
        ),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", help="Also make this picture after figure A.1: fillings at ratios from 100% to 20%."),
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Also give mean PSNR (dB) and SSIM, and LPIPS where its weights are.")
    ] = False,
    codes: Annotated[
        Path | None, typer.Option("--codes", help="Also write the code maps here: .npy, uint16 [h, w, c].")
    ] = None,
    weights: Weights = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pass images through a tokenizer and back, to PNGs of the same names and sizes."""
    if mask_ratio is not None or mask is not None:
        from movq_cli.commands import fill

        _refuse_beside_masks(mask_ratio, mask, {"--run": run, "--grid": grid, "--metrics": metrics, "--codes": codes})
        filling = fill.Filling(mask_ratio, mask, top1, 1 if top1 else samples, steps, seed, figure)
        fill.fill(
            source, out, filling, prior=prior, split=_split(split), device=device, console=_console(as_json, quiet)
        )
        return
    if figure is not None or prior is not None or top1 or samples > 1 or steps is not None:
        raise BadRequestError(
            "--figure, --prior, --top1, --samples and --steps go with --mask-ratio or --mask", "Give one of these."
        )
    from movq_cli.commands import reconstruct as command

    command.reconstruct(
        source,
        out,
        run=run,
        split=_split(split),
        batch_size=batch_size,
        grid=grid,
        metrics=metrics,
        codes=codes,
        weights=weights,
        device=device,
        console=_console(as_json, quiet),
    )


@app.command()
def sample(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder of the PNGs and their manifest.json, or a .zip or .npz file."),
    ],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Images.")] = 16,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Decoding steps. [default: the preset's, 8 or 12]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of image 0; image i has seed + i.")] = 0,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="CLASS",
            help="Class name or number, repeatable, taken in turn. [default: all in turn]",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Prior's run folder or .safetensors file. [default: the newest finished one]",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Run folder or .safetensors file. [default: beside the prior]", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of the codes' distribution, above 0. [default: the preset's, 1]", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Draw only among so many likeliest codes. [default: the preset's, all]", show_default=False
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw only among the likeliest codes of this share, above 0, at most 1. [default: the preset's, 1]",
            show_default=False,
        ),
    ] = None,
    choice_temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Of which codes are kept. [default: the preset's, 4.5]", show_default=False),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Classifier-free guidance; 0 = off, the paper's setting. [default: 0]",
            show_default=False,
        ),
    ] = None,
    guidance_schedule: Annotated[
        str | None,
        typer.Option(
            metavar="constant|linear",
            help="Guidance over the steps; linear = rising to the whole. [default: the preset's, constant]",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = 64,
    grid: Annotated[Path | None, typer.Option(help="Also make this picture of the first hundred.")] = None,
    device: Device = None,
    gpus: Gpus = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw images from a prior. Run again, it makes only what is missing."""
    from movq_cli.commands import sample as command

    command.sample(
        out,
        n=n,
        run=run,
        tokenizer=tokenizer,
        seed=seed,
        classes=classes or (),
        asked={
            "steps": steps,
            "temperature": temperature,
            "choice_temperature": choice_temperature,
            "top_k": top_k,
            "top_p": top_p,
            "guidance": guidance,
            "guidance_schedule": guidance_schedule,
        },
        batch_size=batch_size,
        grid=grid,
        device=device,
        gpus=gpus,
        console=_console(as_json, quiet),
    )


@app.command()
def evaluate(
    sets: Annotated[
        list[str],
        typer.Argument(
            metavar="REAL FAKE",
            help="Originals, then reconstructions or samples: folder, zip, tar, prepared set, .npz of pixels; REAL may "
            "be statistics. One set for --stats and --codebook, JSON files for --table.",
            show_default=False,
        ),
    ],
    fid: Annotated[bool, typer.Option("--fid", help="Frechet Inception distance, lower is better.")] = False,
    isc: Annotated[bool, typer.Option("--is", help="Inception Score of FAKE, higher is better.")] = False,
    kid: Annotated[bool, typer.Option("--kid", help="Kernel Inception distance, lower is better.")] = False,
    prc: Annotated[bool, typer.Option("--prc", help="Precision and recall, 0 to 1, by Inception.")] = False,
    prc_vgg: Annotated[bool, typer.Option("--prc-vgg", help="The same by VGG-16, StyleGAN's convention.")] = False,
    psnr: Annotated[bool, typer.Option("--psnr", help="PSNR of pairs of the same name, dB.")] = False,
    ssim: Annotated[bool, typer.Option("--ssim", help="SSIM of pairs of the same name.")] = False,
    lpips: Annotated[bool, typer.Option("--lpips", help="LPIPS of pairs of the same name, lower is better.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every figure that the inputs allow; fetches weights that are missing.")
    ] = False,
    codebook: Annotated[
        bool, typer.Option("--codebook", help="Usage and perplexity of a tokenizer's codebook on REAL.")
    ] = False,
    copies: Annotated[
        Path | None,
        typer.Option("--copies", help="Look for copies of REAL in FAKE, and make this picture of the nearest."),
    ] = None,
    stats: Annotated[
        str | None,
        typer.Option("--stats", help="Write REAL's statistics to this .npz, or keep them under this name."),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Print JSON files side by side, as Markdown.")] = False,
    split: Annotated[str, typer.Option(help="train or val: of a prepared set.")] = "val",
    crop: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Compare central squares of so many pixels, short sides resized to it. [default: images as they are]",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End at a corrupt image, not leave it out.")] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", "-p", help="Show this preset's published figures beside. [default: none]", show_default=False
        ),
    ] = None,
    run: VQRun = None,
    weights: Weights = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Where features are kept. [default: ~/.cache/movq]", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write the figures and their protocol to this JSON file."),
    ] = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    gpus: Gpus = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure FAKE against REAL; without a figure named, all that the inputs and weights allow."""
    figures = {"psnr": psnr, "ssim": ssim, "lpips": lpips, "fid": fid, "isc": isc, "kid": kid}
    figures |= {"prc": prc, "prc_vgg": prc_vgg}
    named = tuple(name for name, wanted in figures.items() if wanted)
    console = _console(as_json, quiet)
    one = stats is not None or (len(sets) == 1 and codebook and not named and not every and copies is None)
    if not table and len(sets) != (1 if one else 2):
        wanted = "--stats takes one set" if one else "two sets are compared, REAL and FAKE"
        raise BadRequestError(f"{wanted}, not {len(sets)} ({', '.join(sets)})", "See `movq evaluate --help`.")
    if table:
        from movq_cli.commands.evaluation_table import tabulate

        tabulate(sets, console)
        return
    from movq_cli.commands.comparison import Request

    asked = Request(
        metrics=named,
        insist=bool(named) or every,
        copies=copies,
        codebook=codebook,
        run=run,
        split=_split(split),
        crop=crop,
        strict=strict,
        batch_size=batch_size,
        weights=weights,
        cache=cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "movq",
        preset=preset,
        device=device,
        gpus=gpus,
        out=out,
    )
    if stats is not None:
        from movq_cli.commands.statistics import statistics

        statistics(stats, sets[0], asked, console)
        return
    from movq_cli.commands import evaluate as command

    if len(sets) == 1:
        command.codebook(sets[0], asked, console)
    else:
        command.evaluate(sets[0], sets[1], asked, console)


@app.command("weights")
def weights_(
    weights: Weights = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download what is missing, into the folder of --weights where one is given.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which pretrained networks are here (Inception, VGG, AlexNet), where they are looked for, and fetch them."""
    from movq_cli.commands.weights import show_weights

    show_weights(weights, fetch=fetch, console=_console(as_json, quiet))


@presets_app.callback()
def presets(context: typer.Context, as_json: Json = False) -> None:
    """List the presets with the published figures that they are held against."""
    from movq_cli.commands import presets as command

    if context.invoked_subcommand is None:
        command.list_presets(Console(as_json=as_json))


@presets_app.command("show")
def presets_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Preset's name, or path of a .yaml file.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Print one preset with everything that it inherits, as YAML that loads again."""
    from movq_cli.commands import presets as command

    command.show_preset(name, overrides or (), Console(as_json=as_json))


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        app(prog_name="movq")
    except MovqError as error:
        code = _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _complain("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has enough of it. Nothing is left to flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = _complain(f"{error.filename or 'input or output'}: {error.strerror or error}", FailureError.exit_code)
    except Exception as error:
        code = _unforeseen(error)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


def _unforeseen(error: Exception) -> int:
    """A fault of ours, or memory: one line all the same, and the traceback for who asks for it."""
    if os.environ.get("MOVQ_TRACEBACK"):
        traceback.print_exc()
    text = " ".join(str(error).split())[:300]
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        return _complain(f"out of memory. Try a smaller batch size. ({text})", FailureError.exit_code)
    return _complain(
        f"unexpected {type(error).__name__}: {text}. Set MOVQ_TRACEBACK=1 to see where.",
        FailureError.exit_code,
    )


def _refuse_beside_masks(ratio: float | None, mask: Path | None, others: dict[str, object]) -> None:
    if ratio is not None and mask is not None:
        raise BadRequestError("--mask-ratio and --mask both say what is hidden", "Give one of them.")
    given = [name for name, value in others.items() if value]
    if given:
        raise BadRequestError(f"{given[0]} does not go with --mask-ratio or --mask", "Leave it out.")


def _console(as_json: bool, quiet: bool) -> Console:
    # Of the processes that torchrun starts, the first one speaks.
    return Console(as_json=as_json, quiet=quiet, mute=os.environ.get("RANK", "0") != "0")


def _overrides(overrides: list[str] | None, data: Path | None) -> list[str]:
    # As a JSON string, which is YAML too: a path may hold anything.
    import json

    return [*(overrides or ()), *([] if data is None else [f"data.path={json.dumps(str(data))}"])]


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


def _split(name: str | None) -> Any:  # noqa: ANN401 - a literal of the data layer, which is imported late
    if name not in {None, "train", "val"}:
        raise BadRequestError(f"--split {name!r} is neither train nor val")
    return name
