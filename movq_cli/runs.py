"""Run folders: the files of a training run, its manifest, and the search for a run. This module needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from movq_cli import digests
from movq_cli.digests import Header
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write
from movq_cli.settings import Preset, Settings, TokenizerSettings
from movq_cli.version import __version__

Kind = Literal["vq", "prior"]
"""Kind of a run: that of a tokenizer (stage 1) or of a prior (stage 2)."""

ROOT = Path("runs")
"""Folder, relative to the current one, below which run folders are created and searched for."""

WEIGHTS: dict[Kind, str] = {"vq": "tokenizer.safetensors", "prior": "prior.safetensors"}
"""Name of the weight file of each kind of run."""

COMMAND: dict[Kind, str] = {"vq": "train-vq", "prior": "train-prior"}
"""Command that trains each kind of run."""

_FREE_TO_CHANGE = frozenset(
    f"{section}.{name}"
    for section in ("train_vq", "train_prior")
    for name in (
        *("steps", "epochs", "log_every", "validate_every", "evaluate_every", "evaluate_images"),
        *("checkpoint_every", "tensorboard"),
        *("accumulate", "compile", "activation_checkpointing", "channels_last"),
        *("precision", "base_learning_rate", "warmup_steps", "decay", "clip_norm"),
        *("l1_weight", "l2_weight", "perceptual_weight", "codebook_weight", "commitment_weight", "adversarial_weight"),
        *("discriminator_start", "discriminator_ramp", "discriminator_warmup", "discriminator_learning_rate"),
        *("adaptive_weight_limit", "revive_every", "weight_decay", "label_dropout", "label_smoothing"),
    )
) | {"data.workers", "data.path", "description"}
"""Settings that may differ when a run is resumed: its length, how it is computed and monitored, and what a user changes
after training has become unstable or to go on in another way: rates, and weights of losses."""


class ImportRecord(Settings):
    """The origin of imported weights."""

    source: str
    """Path of the file or folder, as the user gave it."""
    sha256: str
    """SHA-256 of the file; of several files, that of the lines `NAME SHA-256`."""
    family: str
    """Name of the family of public weights."""
    used: str
    """What was used of the file, in words."""
    assumed: tuple[str, ...]
    """What neither the tensors nor a config say, in words."""
    license: str
    """What is known about the license of the weights."""


class RunManifest(Header):
    """The content of `run.json`: what a run trains, and how far it is."""

    kind: Kind
    preset: str
    """Name of the preset, or path of the preset file."""
    status: Literal["running", "finished"] = "running"
    step: int = 0
    """Number of steps done."""
    steps: int
    """Number of steps of the complete run."""
    best_step: int | None = None
    """Step of the validation with the highest score, whose weights are saved as the best ones."""
    best_score: float | None = None
    """The highest score of a validation."""
    started: str
    """Time of the start in UTC, in ISO 8601."""
    finished: str | None = None
    """Time of the end in UTC; None while the run is in progress."""
    version: str = __version__
    """Version of movq that started the run."""
    data: str | None
    """Hash of the prepared set; None for imported weights."""
    tokenizer: str | None = None
    """SHA-256 of the weight file of the tokenizer whose codes a prior models."""
    imported: ImportRecord | None = None
    """Origin of the weights, if they were imported and not trained here."""
    settings: Preset


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
                self.manifest_file, RunManifest, "Remove the folder, or name another run folder."
            )
        except (FileNotFoundError, NotADirectoryError):
            raise BadRequestError(
                f"{self.folder} is not a run folder (it has no run.json)", _train_first(self.kind)
            ) from None

    def write(self, manifest: RunManifest) -> None:
        """Replace the manifest."""
        digests.write_header(self.manifest_file, manifest)


def start_or_resume(
    run: Run, *, preset_name: str, settings: Preset, steps: int, data: str, tokenizer: str | None = None
) -> RunManifest:
    """Start a run, or resume the run that is in the folder.

    Args:
        run: Run folder.
        preset_name: Name of the preset, or path of the preset file, for the manifest.
        settings: Settings of the preset, with all overrides.
        steps: Number of steps of the complete run.
        data: Hash of the prepared set.
        tokenizer: SHA-256 of the tokenizer's weight file, for a prior.

    Returns:
        The manifest as it now is on disk.

    Raises:
        BadRequestError: The folder contains a run of another kind, or with other settings, data or tokenizer.
    """
    manifest = RunManifest(
        kind=run.kind,
        preset=preset_name,
        steps=steps,
        started=now(),
        data=data,
        tokenizer=tokenizer,
        settings=settings,
    )
    if run.manifest_file.exists():
        before = run.read()
        _require_same_run(run, before, manifest)
        is_finished = before.status == "finished" and before.step >= steps
        manifest = before.model_copy(
            update={"steps": steps, "settings": settings, "status": "finished" if is_finished else "running"}
        )
    run.write(manifest)
    _write_settings(run, settings)
    return manifest


def write_imported(run: Run, settings: Preset, record: ImportRecord) -> None:
    """Write the manifest and the settings of a run whose weights were imported; it is finished."""
    time = now()
    _write_settings(run, settings)
    run.write(
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
        )
    )


def _write_settings(run: Run, settings: Preset) -> None:
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    atomic_write(run.folder / "settings.yaml", text.encode())


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


def find_weights(path: Path | None, kind: Kind) -> Path:
    """Return the weight file that a command uses: `path` itself if it is a file, else that of the run at `path`."""
    return path if path is not None and path.is_file() else find_run(path, kind).weights


def now() -> str:
    """Return the time in UTC to the microsecond, in ISO 8601, as manifests record it."""
    return datetime.now(UTC).isoformat()


def _newest_finished(kind: Kind, fits: TokenizerSettings | None, root: Path) -> Run:
    finished: list[tuple[str, Run]] = []
    for file in root.glob("*/run.json"):
        run = Run(file.parent, kind)
        manifest = run.read()
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


def _require_same_run(run: Run, before: RunManifest, after: RunManifest) -> None:
    """Refuse to resume a run with anything that would make it another run."""
    remedy = "Name another folder with --run, or remove this one."
    if before.kind != after.kind:
        raise BadRequestError(f"{run.folder} is a run of `movq {COMMAND[before.kind]}`", remedy)
    if before.imported is not None:
        raise BadRequestError(f"{run.folder} holds imported weights, whose training cannot be resumed", remedy)
    if before.tokenizer != after.tokenizer:
        raise BadRequestError(
            f"{run.folder} was trained on the codes of another tokenizer ({_short(before.tokenizer)}, "
            f"not {_short(after.tokenizer)})",
            remedy,
        )
    if before.data != after.data:
        raise BadRequestError(f"{run.folder} was trained on another prepared set", remedy)
    changed = [
        f"{name}: {old} before, {new} now"
        for name, old, new in _differences(before.settings.model_dump(), after.settings.model_dump(), before.kind)
    ]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise BadRequestError(f"{run.folder} was trained with other settings ({changed[0]}{more})", remedy)


def _differences(before: dict[str, Any], after: dict[str, Any], kind: Kind) -> list[tuple[str, Any, Any]]:
    """Return the settings that differ, with both values, of those on which training of this kind depends."""
    sections = {"vq": ("data", "vq", "train_vq"), "prior": ("data", "vq", "views", "prior", "train_prior")}[kind]
    return [
        (f"{section}.{name}", before[section].get(name), value)
        for section in sections
        for name, value in after[section].items()
        if before[section].get(name) != value and f"{section}.{name}" not in _FREE_TO_CHANGE
    ]


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
