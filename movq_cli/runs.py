"""Run folders: the files of a training run, its manifest, and the search for a run. This module needs no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from movq_cli import digests
from movq_cli.console import write_line
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write
from movq_cli.interop import hub
from movq_cli.run_changes import FREE_TO_CHANGE, changed_settings, require_same_run
from movq_cli.run_manifest import COMMAND, Change, ImportRecord, Kind, RunManifest
from movq_cli.settings import Preset, TokenizerSettings

ROOT = Path("runs")
"""Folder, relative to the current one, below which run folders are created and searched for."""

WEIGHTS: dict[Kind, str] = {"vq": "tokenizer.safetensors", "prior": "prior.safetensors"}
"""Name of the weight file of each kind of run."""


@dataclass(frozen=True)
class Run:
    """A run folder and the paths of its files."""

    folder: Path
    kind: Kind

    @property
    def manifest_file(self) -> Path:
        """The manifest, `run.json`."""
        return self.folder / "run.json"

    @property
    def checkpoint(self) -> Path:
        """The training state from which the run is resumed."""
        return self.folder / "checkpoint.pt"

    def kept_checkpoint(self, step: int) -> Path:
        """Return the path of the earlier training state of a step, if it is stored."""
        return self.folder / "checkpoints" / f"{step:08d}.pt"

    def kept_steps(self) -> list[int]:
        """Return the steps whose earlier training states are stored, in increasing order."""
        files = (self.folder / "checkpoints").glob("*.pt")
        return sorted(int(path.stem) for path in files if path.stem.isdigit())

    @property
    def weights(self) -> Path:
        """The weights for inference, with the settings of the model."""
        return self.folder / WEIGHTS[self.kind]

    @property
    def tokenizer(self) -> Path:
        """The weights of the trained tokenizer, or of the tokenizer on whose codes a prior was trained."""
        return self.folder / WEIGHTS["vq"]

    @property
    def discriminator(self) -> Path:
        """The weights of the discriminator that was imported with a tokenizer."""
        return self.folder / "discriminator.safetensors"

    @property
    def log(self) -> Path:
        """The log, with one JSON object per line: losses and validations."""
        return self.folder / "log.jsonl"

    @property
    def best(self) -> Path:
        """The weights for inference of the best validation so far."""
        return self.weights.with_stem(f"{self.weights.stem}-best")

    @property
    def events(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.folder / "tensorboard"

    @property
    def code_caches(self) -> Path:
        """The folder of a tokenizer run's code caches."""
        return self.folder / "tokens"

    def picture(self, step: int) -> Path:
        """Return the path of the picture of a step."""
        return self.folder / "pictures" / f"{step:08d}.png"

    def read(self) -> RunManifest:
        """Read the manifest.

        Raises:
            BadRequestError: The folder is not a run folder, or its manifest is damaged.
        """
        try:
            return digests.read_header(
                self.manifest_file, RunManifest, f"Remove the folder {self.folder}, or name another run folder."
            )
        except (FileNotFoundError, NotADirectoryError):
            raise BadRequestError(
                f"{self.folder} is not a run folder (it has no run.json)", _train_first(self.kind)
            ) from None

    def write(self, manifest: RunManifest) -> None:
        """Replace the manifest."""
        digests.write_header(self.manifest_file, manifest)


def new_manifest(
    kind: Kind,
    *,
    preset_name: str,
    settings: Preset,
    steps: int,
    data: str,
    tokenizer: str | None = None,
    hours: float | None = None,
) -> RunManifest:
    """Return the manifest of a run that starts now; nothing is written.

    Args:
        kind: Kind of the run.
        preset_name: Name of the preset, or path of the preset file.
        settings: Settings of the preset, with all overrides.
        steps: Number of steps of the complete run.
        data: Hash of the prepared set.
        tokenizer: SHA-256 of the tokenizer's weight file, for a prior.
        hours: Time that the request gave to the run; None if it gave the number of steps or epochs.
    """
    return RunManifest(
        kind=kind,
        preset=preset_name,
        steps=steps,
        started=now(),
        data=data,
        tokenizer=tokenizer,
        hours=hours,
        settings=settings,
    )


def start_or_resume(run: Run, manifest: RunManifest, initial: tuple[str, tuple[str, ...]] | None = None) -> RunManifest:
    """Start a run, or resume the run that is in the folder.

    Args:
        run: Run folder.
        manifest: Manifest of the run if it starts now; a run in the folder gets its settings, steps and hours.
        initial: Path of the weight file with which the run begins, and its `Change.weights`; None begins with random
            weights, or resumes a run whatever it began with.

    Returns:
        The manifest as it now is on disk.

    Raises:
        BadRequestError: The folder contains a run of another kind, or with other settings, data, tokenizer or initial
            weights; or it has lost its checkpoint, and would begin otherwise than it did.
    """
    if run.manifest_file.exists():
        manifest = resumed(run, manifest, initial)
        if lacks_checkpoint(run, manifest):
            _require_origin(run, manifest, initial)
    elif initial is not None:
        path, digests_of_weights = initial
        entry = Change(step=0, time=now(), branched_from=path, weights=digests_of_weights, settings={})
        manifest = manifest.model_copy(update={"history": (entry,)})
    write(run, manifest)
    return manifest


def resumed(run: Run, manifest: RunManifest, initial: tuple[str, tuple[str, ...]] | None = None) -> RunManifest:
    """Return the manifest of the run in the folder as `start_or_resume` resumes it; nothing is written.

    Raises:
        BadRequestError: The run is of another kind, or has other settings, data, tokenizer or initial weights.
    """
    before = run.read()
    changes = changed_settings(before.settings, manifest.settings, run.kind)
    different = {name: values for name, values in changes.items() if name not in FREE_TO_CHANGE}
    require_same_run(run.folder, before, manifest, different, "Name another folder with --run, or remove this one.")
    if initial is not None and initial[1] not in {change.weights for change in before.history}:
        raise BadRequestError(
            f"{run.folder} did not begin with the weights in {initial[0]}",
            "Name another folder with --run, or omit --init.",
        )
    entry = Change(step=before.step, time=now(), settings=changes)
    stops_early = before.model_copy(update={"settings": manifest.settings}).has_stopped_improving
    is_finished = before.status == "finished" and (before.step >= manifest.steps or stops_early)
    return before.model_copy(
        update={
            "steps": manifest.steps,
            "hours": manifest.hours,
            "settings": manifest.settings,
            "status": "finished" if is_finished else "running",
            "stopped_early": before.stopped_early and is_finished,
            "history": (*before.history, entry) if changes else before.history,
        }
    )


def lacks_checkpoint(run: Run, manifest: RunManifest) -> bool:
    """Return whether the run is to be trained, but has no checkpoint from which it could go on."""
    is_complete = manifest.status == "finished" and run.weights.is_file()
    return not is_complete and not run.checkpoint.is_file()


def _require_origin(run: Run, manifest: RunManifest, initial: tuple[str, tuple[str, ...]] | None) -> None:
    """Check that a run without a checkpoint begins again as it began, and not with random weights.

    Raises:
        BadRequestError: It went on from another run, or it began with weights that the request does not name.
    """
    origin = manifest.origin
    if origin is None or (origin.weights and initial is not None):
        return
    if origin.weights:
        began, option = f"began with the weights in {origin.branched_from}", f"--init {origin.branched_from}"
    else:
        began = f"went on from step {origin.step} of {origin.branched_from}"
        option = f"--from {origin.branched_from}@{origin.step}"
    raise BadRequestError(
        f"{run.folder} {began}, and {run.checkpoint.name}, from which it could be resumed, is missing",
        f"Add {option} to begin in the same way again, or remove {run.folder} to train from the start.",
    )


def write_imported(run: Run, settings: Preset, record: ImportRecord) -> None:
    """Write the manifest and the settings of a run whose weights were imported; it is finished."""
    time = now()
    write(
        run,
        RunManifest(
            kind=run.kind,
            preset="settings.yaml",
            status="finished",
            steps=0,
            started=time,
            finished=time,
            data=None,
            imported=record,
            settings=settings,
        ),
    )


def write(run: Run, manifest: RunManifest) -> None:
    """Write the settings of a run as a preset, and then its manifest, without which the folder is no run."""
    text = yaml.safe_dump(manifest.settings.model_dump(mode="json"), sort_keys=False)
    atomic_write(run.folder / "settings.yaml", text.encode())
    run.write(manifest)


def branch(origin: Run, step: int, manifest: RunManifest) -> RunManifest:
    """Return the manifest of a run that goes on from a state of another run; nothing is written.

    Args:
        origin: Run whose state is the start.
        step: Number of steps that this state has done; they count as steps of the new run.
        manifest: Manifest of the new run, as `new_manifest` returned it.

    Raises:
        BadRequestError: The models have another architecture, or the data or the tokenizer differ.
    """
    before = origin.read()
    fixed = {"vq": ("vq.",), "prior": ("vq.", "prior.")}[origin.kind]
    changes = changed_settings(before.settings, manifest.settings, origin.kind)
    # A training in random orders has one parameter more.
    different = {
        name: values
        for name, values in changes.items()
        if (name.startswith(fixed) and name not in FREE_TO_CHANGE)
        or (name == "train_prior.random_order" and None in values)
    }
    require_same_run(origin.folder, before, manifest, different, "Go on with these settings, or train from the start.")
    entry = Change(step=step, time=now(), branched_from=str(origin.folder), settings=changes)
    earlier = tuple(change for change in before.history if change.step <= step)
    return manifest.model_copy(update={"step": step, "history": (*earlier, entry)})


def find_run(path: Path | None, kind: Kind, *, fits: TokenizerSettings | None = None, root: Path = ROOT) -> Run:
    """Find the run whose weights a command uses.

    Args:
        path: Run folder; None finds the newest finished run below `root`.
        kind: Kind of the run.
        fits: Tokenizer settings that a run below `root` must have; None accepts any.
        root: Folder of the run folders.

    Raises:
        BadRequestError: There is no such run, or it has no weights yet.
    """
    if path is None:
        return _newest_finished(kind, fits, root)
    if not path.exists():
        raise BadRequestError(f"no run folder at {path}", _train_first(kind))
    run = Run(path, kind)
    if not run.weights.is_file():
        if not run.manifest_file.exists():
            raise BadRequestError(f"{path} holds no {WEIGHTS[kind]}", _train_first(kind))
        manifest = run.read()
        if manifest.kind != kind:
            raise BadRequestError(f"{path} is a run of `movq {COMMAND[manifest.kind]}`", _train_first(kind))
        if manifest.imported is not None:
            raise BadRequestError(
                f"{path} has lost its {WEIGHTS[kind]}",
                f"Remove the folder, and import them again: movq import {manifest.imported.source} {path}",
            )
        state = "has lost" if manifest.step else "does not have"
        raise BadRequestError(
            f"{path} {state} its {WEIGHTS[kind]} (step {manifest.step} of {manifest.steps})",
            f"Resume it: movq {COMMAND[kind]} --preset {manifest.preset} --run {path}",
        )
    return run


def find_weights(
    path: Path | None, kind: Kind, *, fits: TokenizerSettings | None = None, beside: Collection[str] = ()
) -> Path:
    """Return the weight file that a command uses: `path` itself if it is a file, else that of the run at `path`.

    An address on the Hugging Face hub is downloaded first, a prior with its tokenizer.

    Args:
        path: Weight file, run folder or address; None finds the newest finished run.
        kind: Kind of the run.
        fits: Tokenizer settings that a run which is found must have; None accepts any.
        beside: Names of further files that are downloaded from an address, if they are there.
    """
    address = hub.address_of(path)
    if address is not None:
        return hub.download_weights(address, WEIGHTS[kind], beside=beside if kind == "vq" else (WEIGHTS["vq"], *beside))
    return path if path is not None and path.is_file() else find_run(path, kind, fits=fits).weights


def find_best(path: Path | None, kind: Kind) -> Path:
    """Return the weights of a run's best validation.

    Args:
        path: Run folder; None finds the newest finished run. For an address on the Hugging Face hub, the result is the
            address of the file.
        kind: Kind of the run.

    Raises:
        BadRequestError: There is no such run, or it has no such weights.
    """
    address = hub.address_of(path)
    is_weight_file = path is not None and (path.is_file() if address is None else path.suffix == ".safetensors")
    if is_weight_file:
        raise BadRequestError(
            f"{address or path} is a weight file already", "Omit --weights-of, or name the run folder."
        )
    if path is not None and address is not None:
        return path / Run(path, kind).best.name
    run = find_run(path, kind)
    if not run.best.is_file():
        raise BadRequestError(
            f"{run.folder} has no {run.best.name}", "Use the weights of its last step: omit --weights-of."
        )
    return run.best


def now() -> str:
    """Return the time in UTC to the microsecond, in ISO 8601, as manifests record it."""
    return datetime.now(UTC).isoformat()


def _newest_finished(kind: Kind, fits: TokenizerSettings | None, root: Path) -> Run:
    finished: list[tuple[str, Run]] = []
    for file in root.glob("*/run.json"):
        run = Run(file.parent, kind)
        try:
            manifest = run.read()
        except (BadRequestError, OSError) as error:
            write_line(f"warning: the run in {run.folder} is passed over: {error}")
            continue
        is_usable = manifest.kind == kind and fits in (None, manifest.settings.vq) and run.weights.is_file()
        if is_usable and manifest.finished is not None:
            finished.append((manifest.finished, run))
    if not finished:
        condition = "" if fits is None else " with these vq settings"
        raise BadRequestError(
            f"there is no finished run of `movq {COMMAND[kind]}`{condition} below {root}/", _train_first(kind)
        )
    return max(finished, key=lambda pair: pair[0])[1]


def _train_first(kind: Kind) -> str:
    return f"Train one (movq {COMMAND[kind]} --preset NAME), or name the run folder of one."
