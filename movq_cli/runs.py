"""The run folder: where a training run keeps things, its manifest, and the newest finished one. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write
from movq_cli.settings import Preset, Settings, TokenizerSettings
from movq_cli.version import __version__

Kind = Literal["vq", "prior"]

ROOT = Path("runs")
"""Where run folders are made and looked for, below the current folder."""

WEIGHTS: dict[Kind, str] = {"vq": "tokenizer.safetensors", "prior": "prior.safetensors"}
COMMAND: dict[Kind, str] = {"vq": "train-vq", "prior": "train-prior"}

_FREE_TO_CHANGE = frozenset(
    f"{section}.{name}"
    for section in ("train_vq", "train_prior")
    for name in (
        *("steps", "epochs", "log_every", "validate_every", "evaluate_every", "evaluate_images"),
        *("checkpoint_every", "tensorboard"),
        *("accumulate", "compile", "activation_checkpointing", "channels_last"),
        *("precision", "base_learning_rate", "clip_norm"),
    )
) | {"data.workers", "data.path", "description"}
"""Settings that a run may be continued with another value of: how long it is, how it is computed and watched, and what
one changes where it has become unstable."""


class RunManifest(Settings):
    """What `run.json` says of a run."""

    kind: Kind
    preset: str
    status: Literal["running", "finished"] = "running"
    step: int = 0
    steps: int
    best_step: int | None = None
    """Of the validation whose weights are kept as the best."""
    best_score: float | None = None
    """What it was chosen by, higher is better."""
    started: str
    finished: str | None = None
    version: str = __version__
    data: str
    """Hash of the prepared set."""
    tokenizer: str | None = None
    """SHA-256 of the tokenizer whose codes a prior models."""
    settings: Preset


@dataclass(frozen=True)
class Run:
    """A run folder and the paths of what it holds."""

    folder: Path
    kind: Kind

    @property
    def manifest_file(self) -> Path:
        """What the run is and how far it is."""
        return self.folder / "run.json"

    @property
    def checkpoint(self) -> Path:
        """Everything that resuming needs."""
        return self.folder / "checkpoint.pt"

    @property
    def weights(self) -> Path:
        """What inference needs: the model with its settings."""
        return self.folder / WEIGHTS[self.kind]

    @property
    def tokenizer(self) -> Path:
        """The tokenizer: the run's own, or the one whose codes a prior was trained on."""
        return self.folder / WEIGHTS["vq"]

    @property
    def log(self) -> Path:
        """One JSON object a line: losses, validations."""
        return self.folder / "log.jsonl"

    @property
    def best(self) -> Path:
        """As `weights`, from the best validation so far."""
        return self.weights.with_stem(f"{self.weights.stem}-best")

    @property
    def events(self) -> Path:
        """TensorBoard's files."""
        return self.folder / "tensorboard"

    @property
    def code_caches(self) -> Path:
        """The code caches that a tokenizer's run keeps."""
        return self.folder / "tokens"

    def picture(self, step: int) -> Path:
        """The picture made at a step."""
        return self.folder / "pictures" / f"{step:08d}.png"

    def read(self) -> RunManifest:
        """The manifest.

        Raises:
            BadRequestError: The folder is no run, or its manifest is damaged.
        """
        try:
            return RunManifest.model_validate_json(self.manifest_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise BadRequestError(
                f"{self.folder} is not a run folder (it has no run.json)", _train_first(self.kind)
            ) from None
        except (ValidationError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise BadRequestError(
                f"{self.manifest_file} cannot be read: {reason}", "Remove the folder or name another run."
            ) from None

    def write(self, manifest: RunManifest) -> None:
        """Replace the manifest."""
        atomic_write(self.manifest_file, manifest.model_dump_json(indent=2).encode())


def begin(
    run: Run, *, preset: str, settings: Preset, steps: int, data: str, tokenizer: str | None = None
) -> RunManifest:
    """Start a run, or go on with the one in the folder.

    Args:
        run: The folder.
        preset: Name of the preset, for the record.
        settings: The resolved settings.
        steps: Of the whole run.
        data: Hash of the prepared set.
        tokenizer: SHA-256 of the tokenizer, for a prior.

    Returns:
        The manifest as it now stands on disk.

    Raises:
        BadRequestError: The folder holds a run of other settings, data or tokenizer.
    """
    manifest = RunManifest(
        kind=run.kind,
        preset=preset,
        steps=steps,
        started=now(),
        data=data,
        tokenizer=tokenizer,
        settings=settings,
    )
    if run.manifest_file.exists():
        before = run.read()
        _same_run(run, before, manifest)
        finished = before.status == "finished" and before.step >= steps
        manifest = before.model_copy(
            update={"steps": steps, "settings": settings, "status": "finished" if finished else "running"}
        )
    run.write(manifest)
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    atomic_write(run.folder / "settings.yaml", text.encode())
    return manifest


def resolve(path: Path | None, kind: Kind, *, fits: TokenizerSettings | None = None, root: Path = ROOT) -> Run:
    """The run that a command works with.

    Args:
        path: A run folder; None = the newest finished one below `root`.
        kind: Which stage's.
        fits: Of the runs below `root`, only those of this tokenizer; None = of any.
        root: Where run folders are.

    Raises:
        BadRequestError: No such run, or one that has no weights yet.
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
        raise BadRequestError(
            f"{path} has no checkpoint yet (step {manifest.step} of {manifest.steps})",
            f"Go on with it: movq {COMMAND[kind]} --preset {manifest.preset} --run {path}",
        )
    return run


def weights(path: Path | None, kind: Kind) -> Path:
    """The weight file that a command works with: the file itself, or that of the run which `resolve` finds."""
    return path if path is not None and path.is_file() else resolve(path, kind).weights


def now() -> str:
    """The time in UTC to the microsecond, as manifests record it."""
    return datetime.now(UTC).isoformat()


def _newest_finished(kind: Kind, fits: TokenizerSettings | None, root: Path) -> Run:
    finished: list[tuple[str, Run]] = []
    for file in root.glob("*/run.json"):
        run = Run(file.parent, kind)
        manifest = run.read()
        usable = manifest.kind == kind and fits in (None, manifest.settings.vq) and run.weights.is_file()
        if usable and manifest.finished is not None:
            finished.append((manifest.finished, run))
    if not finished:
        which = "" if fits is None else " with these vq settings"
        raise BadRequestError(f"no finished run of `movq {COMMAND[kind]}`{which} below {root}/", _train_first(kind))
    return max(finished, key=lambda pair: pair[0])[1]


def _train_first(kind: Kind) -> str:
    return f"Train one (movq {COMMAND[kind]} --preset NAME) or name a run folder that has one."


def _same_run(run: Run, before: RunManifest, after: RunManifest) -> None:
    elsewhere = "Name another folder with --run, or remove this one."
    if before.kind != after.kind:
        raise BadRequestError(f"{run.folder} is a run of `movq {COMMAND[before.kind]}`", elsewhere)
    if before.tokenizer != after.tokenizer:
        raise BadRequestError(
            f"{run.folder} was trained on the codes of another tokenizer ({_short(before.tokenizer)}, "
            f"not {_short(after.tokenizer)})",
            elsewhere,
        )
    if before.data != after.data:
        raise BadRequestError(f"{run.folder} was trained on another prepared set", elsewhere)
    changed = [
        f"{name}: {old} there, {new} now"
        for name, old, new in _differences(before.settings.model_dump(), after.settings.model_dump(), before.kind)
    ]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise BadRequestError(f"{run.folder} was trained with other settings ({changed[0]}{more})", elsewhere)


def _differences(before: dict[str, Any], after: dict[str, Any], kind: Kind) -> list[tuple[str, Any, Any]]:
    """Settings that differ and that this stage's training depends on."""
    sections = {"vq": ("data", "vq", "train_vq"), "prior": ("data", "vq", "views", "prior", "train_prior")}[kind]
    return [
        (f"{section}.{name}", before[section].get(name), value)
        for section in sections
        for name, value in after[section].items()
        if before[section].get(name) != value and f"{section}.{name}" not in _FREE_TO_CHANGE
    ]


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
