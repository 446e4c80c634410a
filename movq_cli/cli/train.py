"""The options of `movq train-vq` and `movq train-prior`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movq_cli.cli.options import (
    DataPath,
    DeviceName,
    DryRun,
    Gpus,
    Json,
    Overrides,
    PresetName,
    Quiet,
    WeightsFolder,
    WeightsOf,
    chosen_weights,
    console_for,
    require_used_settings,
    with_setting,
)
from movq_cli.cli.setting_options import setting_option
from movq_cli.errors import BadRequestError
from movq_cli.settings import PriorSettings

if TYPE_CHECKING:
    from movq_cli.training.initial_weights import InitialWeights

Origin = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN[@STEP]",
        help="Start from the state of another run: its last checkpoint, or the one of STEP. [default: new weights]",
        show_default=False,
    ),
]


Hours = Annotated[
    float | None,
    typer.Option(
        "--hours",
        min=0.01,
        help="Choose the number of steps so that the training takes about this long on this device: a few steps are "
        "measured first. [default: the preset's steps or epochs]",
        show_default=False,
    ),
]


def preset_or_settings(preset_name: str | None, origin: str | None, run: Path | None) -> str:
    """Return the preset, or without one the settings of the run to start from.

    Raises:
        BadRequestError: There is neither, or the new run has no name.
    """
    if preset_name is not None:
        return preset_name
    if origin is None:
        raise BadRequestError("no preset is given", "Name one with --preset; `movq presets` lists them.")
    _require_name(run)
    from movq_cli.commands.training import origin_of

    folder, _ = origin_of(origin, "vq")
    return str(folder.folder / "settings.yaml")


def _require_name(run: Path | None) -> None:
    """Refuse a new run whose name can follow neither from --run nor from a preset."""
    if run is None:
        raise BadRequestError("the new run has no name", "Name its folder with --run, or give a preset with --preset.")


def _fine_tuning(
    init: Path, preset_name: str | None, origin: str | None, run: Path | None, overrides: list[str]
) -> tuple[InitialWeights, str, list[str]]:
    """Return the weights of --init, the preset, and the overrides with the architecture of the weights.

    Raises:
        BadRequestError: The weights cannot be used with the other options.
    """
    if preset_name is None:
        _require_name(run)
    if origin is not None:
        raise BadRequestError(
            "--init and --from both say with which weights the run begins",
            "Give --from to go on with a training, or --init to begin one with trained weights.",
        )
    from movq_cli.commands import fine_tuning
    from movq_cli.training import initial_weights

    initial = initial_weights.load(init)
    name = preset_name or _settings_beside(initial.path)
    return initial, name, fine_tuning.overrides(initial, name, overrides)


def _settings_beside(weights: Path) -> str:
    """Return the settings of the run folder of a weight file, as the path of a preset.

    Raises:
        BadRequestError: The file is in no run folder.
    """
    settings = weights.parent / "settings.yaml"
    if not settings.is_file():
        raise BadRequestError(
            f"no preset is given, and {weights} is in no run folder",
            "Name a preset with --preset; the architecture is that of the weights in any case.",
        )
    return str(settings)


def train_vq(
    preset_name: PresetName = None,
    data: DataPath = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Folder of the run. [default: runs/PRESET-vq]", show_default=False),
    ] = None,
    origin: Origin = None,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="RUN|WEIGHTS",
            help="Fine-tune the tokenizer of this run folder or weight file, trained or imported, with its "
            "architecture. [default: random weights]",
            show_default=False,
        ),
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(
            "--freeze",
            metavar="PARTS",
            help="Parts that are not trained: encoder, codebook, decoder, separated by commas. With encoder,codebook "
            "all codes stay the same, and priors stay valid. [default: none]",
            show_default=False,
        ),
    ] = None,
    hours: Hours = None,
    overrides: Overrides = None,
    weights: WeightsFolder = None,
    device_name: DeviceName = None,
    gpus: Gpus = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a tokenizer (stage 1). Run the same command again to resume from the last checkpoint."""
    from movq_cli.commands import train_vq as command
    from movq_cli.commands.training import TrainRequest

    console = console_for(as_json, quiet)  # Before a download, whose progress it may silence.
    require_used_settings(overrides, {"vq", "train_vq"}, "train-vq")
    changes = with_setting(overrides, "data.path", "--data", None if data is None else str(data))
    parts = None if freeze is None else [part.strip() for part in freeze.split(",")]
    changes = with_setting(changes, "train_vq.freeze", "--freeze", parts)
    if init is None:
        initial, name = None, preset_or_settings(preset_name, origin, run)
    else:
        initial, name, changes = _fine_tuning(init, preset_name, origin, run, changes)
    request = TrainRequest(
        preset_name=name,
        origin=origin,
        initial=initial,
        overrides=changes,
        run=run,
        device_name=device_name,
        gpus=gpus,
        weights=weights,
        hours=hours,
        dry_run=dry_run,
        arguments=sys.argv[1:],
    )
    command.train_vq(request, console)


def train_prior(
    preset_name: PresetName = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            help="Run folder of the tokenizer, its .safetensors file, or hf://owner/name. "
            "[default: the newest finished run with these "
            "vq settings]",
            show_default=False,
        ),
    ] = None,
    weights_of: WeightsOf = "last",
    codes: Annotated[
        Path | None,
        typer.Option(
            "--codes",
            help="Folder of the cached codes. [default: tokens/ beside the tokenizer, or in the new run if the "
            "tokenizer's folder is read-only]",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[str | None, setting_option(PriorSettings, "mode")] = None,
    data: DataPath = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Folder of the run. [default: runs/PRESET-prior, or -auto, -depth by mode]",
            show_default=False,
        ),
    ] = None,
    origin: Origin = None,
    hours: Hours = None,
    overrides: Overrides = None,
    weights: WeightsFolder = None,
    device_name: DeviceName = None,
    gpus: Gpus = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a prior (stage 2) on the codes of a tokenizer. Run the same command again to resume."""
    from movq_cli.commands import train_prior as command
    from movq_cli.commands.training import TrainRequest

    require_used_settings(overrides, {"vq", "prior", "views", "train_prior", "sample"}, "train-prior")
    changes = with_setting(overrides, "data.path", "--data", None if data is None else str(data))
    request = TrainRequest(
        preset_name=preset_or_settings(preset_name, origin, run),
        origin=origin,
        overrides=with_setting(changes, "prior.mode", "--mode", mode),
        run=run,
        tokenizer=chosen_weights(tokenizer, weights_of, "vq"),
        codes=codes,
        device_name=device_name,
        gpus=gpus,
        weights=weights,
        hours=hours,
        dry_run=dry_run,
        arguments=sys.argv[1:],
    )
    command.train_prior(request, console_for(as_json, quiet))
