"""The content of `run.json`: what a run trains, how far it is, and how it came about. This module needs no torch."""

from __future__ import annotations

from typing import Any, Literal

from movq_cli.digests import Header
from movq_cli.setting_types import Settings
from movq_cli.settings import Preset
from movq_cli.training_settings import TrainSettings
from movq_cli.version import __version__

Kind = Literal["vq", "prior"]
"""Kind of a run: that of a tokenizer (stage 1) or of a prior (stage 2)."""

COMMAND: dict[Kind, str] = {"vq": "train-vq", "prior": "train-prior"}
"""Command that trains each kind of run."""

SECTIONS: dict[Kind, str] = {"vq": "train_vq", "prior": "train_prior"}
"""Section of the training settings of each kind of run."""


def train_settings(settings: Preset, kind: Kind) -> TrainSettings:
    """Return the training settings of a kind of run."""
    return settings.train_vq if kind == "vq" else settings.train_prior


class Change(Settings):
    """An entry of a run's history: a branch from another run, or a resumption with other settings."""

    step: int
    """Number of steps done before the change."""
    time: str
    """Time of the change in UTC, in ISO 8601."""
    branched_from: str | None = None
    """Folder of the run from whose state this run went on, or the weight file with which it began; None for a
    resumption."""
    weights: tuple[str, ...] = ()
    """SHA-256 of that weight file, and of those whose tokenizers give the same codes; empty if there is none."""
    settings: dict[str, tuple[Any, Any]]
    """Changed settings: dotted name to the values before and after."""
    version: str = __version__
    """Version of movq that made the change."""


class ImportRecord(Settings):
    """The origin of imported weights."""

    source: str
    """Path of the file or folder, as the user gave it."""
    sha256: str
    """SHA-256 of the file; of several files, that of the lines `NAME SHA-256`."""
    family: str
    """Name of the family of public weights."""
    used: str
    """Description of the parts of the file that were used, in words."""
    assumed: tuple[str, ...]
    """Assumptions where neither the tensors nor a config gave a value, in words."""
    license: str
    """License of the weights as far as it is known."""


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
    hours: float | None = None
    """Hours from which the number of steps was computed (`--hours`); None = it was given."""
    best_step: int | None = None
    """Step of the validation with the highest score, whose weights are saved as the best ones."""
    best_by: str | None = None
    """Name of the metric by which that validation was the best one."""
    best_score: float | None = None
    """The best value of that metric."""
    validations_since_best: int = 0
    """Number of validations with that metric since the best one, which `early_stop` limits."""
    stopped_early: bool = False
    """Whether the run finished before its last step, because of `early_stop`."""
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
    history: tuple[Change, ...] = ()
    """Changes of the settings since the start, oldest first; a branch has those of the run that it went on from."""

    @property
    def train_settings(self) -> TrainSettings:
        """Settings of the training of this kind."""
        return train_settings(self.settings, self.kind)

    @property
    def origin(self) -> Change | None:
        """The last entry of the history that names another start than random weights; None if there is none."""
        return next((change for change in reversed(self.history) if change.branched_from is not None), None)

    @property
    def has_stopped_improving(self) -> bool:
        """Whether there are as many validations since the best one as `early_stop` allows."""
        limit = self.train_settings.early_stop
        return limit is not None and self.validations_since_best >= limit
