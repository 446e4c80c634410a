"""The trials of a search for settings of sampling: what is searched, and optuna's study of it in a run folder."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from movq_cli import digests
from movq_cli.api import Prior
from movq_cli.commands.tuning_objectives import Metrics, Objective
from movq_cli.data.tuned_settings import JOURNAL
from movq_cli.errors import BadRequestError
from movq_cli.models.masked_prior import ORDERS
from movq_cli.setting_types import MaskSchedule
from movq_cli.settings import SampleSettings

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

_CONFIRMED = "confirmed"

_OPTUNA = 5
"""The first major version of optuna whose trials have constraints of their own."""


@dataclass(frozen=True)
class Space:
    """The settings that are searched; all others have fixed values.

    Args:
        base: Settings of the preset, with the fixed values of the user.
        names: Names of the searched settings.
        codebook_size: Number of codes, the largest top-k.
    """

    base: SampleSettings
    names: tuple[str, ...]
    codebook_size: int

    @classmethod
    def of(cls, prior: Prior, base: SampleSettings, fixed: Mapping[str, Any], *, can_guide: bool) -> Space:
        """Return the settings that the mode of a prior has, without those that the user fixed.

        Args:
            prior: The prior.
            base: Settings of the preset, with the fixed values.
            fixed: Values of the user, by name.
            can_guide: Whether the prior was trained so that guidance works.

        Raises:
            BadRequestError: There is nothing to search.
        """
        unused = {*prior.transformer.unused_sample_settings, *fixed}
        if not can_guide or ("guidance" in fixed and not base.guidance):
            unused |= {"guidance", "guidance_schedule"}
        names = tuple(name for name in _SUGGESTIONS if name not in unused)
        if not names:
            raise BadRequestError(
                "all settings have fixed values, so that there is nothing to search", "Leave some out."
            )
        return cls(base, names, prior.header.shape.codebook_size)

    def suggest(self, trial: Trial) -> SampleSettings:
        """Return the settings of a trial."""
        values = {name: _SUGGESTIONS[name](trial, self) for name in self.names}
        return SampleSettings.model_validate({**self.base.model_dump(), **values})

    @property
    def start(self) -> dict[str, Any]:
        """The parameters of the preset's settings, which are the first trial."""
        values = {name: getattr(self.base, name) for name in self.names}
        return values if values.get("top_k", 0) is not None else {**values, "top_k": self.codebook_size}

    def values(self, settings: SampleSettings) -> dict[str, Any]:
        """Return the values of the searched settings."""
        return {name: getattr(settings, name) for name in self.names}


def _number(name: str, low: float, high: float) -> Callable[[Trial, Space], float]:
    """Return the suggestion of a number with two decimals; the range is widened to the preset's value."""

    def suggest(trial: Trial, space: Space) -> float:
        own = getattr(space.base, name)
        value = trial.suggest_float(name, min(low, own), max(high, own))
        return float(own) if math.isclose(value, own) else round(value, 2)

    return suggest


def _steps(trial: Trial, space: Space) -> int:
    return trial.suggest_int("steps", min(4, space.base.steps), max(32, 2 * space.base.steps), log=True)


def _top_k(trial: Trial, space: Space) -> int | None:
    size = space.codebook_size
    low = min(max(1, size // 16), space.base.top_k or size)
    value = trial.suggest_int("top_k", low, max(size, space.base.top_k or 0), log=True)
    return None if value >= size and value != space.base.top_k else value


def _choice(name: str, values: Sequence[str]) -> Callable[[Trial, Space], str]:
    """Return the suggestion of one of some values."""

    def suggest(trial: Trial, _space: Space) -> str:
        return str(trial.suggest_categorical(name, values))

    return suggest


_SUGGESTIONS: Mapping[str, Callable[[Trial, Space], Any]] = {
    "steps": _steps,
    "temperature": _number("temperature", 0.6, 1.3),
    "choice_temperature": _number("choice_temperature", 0.0, 15.0),
    "order": _choice("order", tuple(ORDERS)),
    "mask_schedule": _choice("mask_schedule", get_args(MaskSchedule)),
    "top_k": _top_k,
    "top_p": _number("top_p", 0.7, 1.0),
    "guidance": _number("guidance", 0.0, 3.0),
    "guidance_schedule": _choice("guidance_schedule", ["constant", "linear", "power-cosine"]),
}
"""How a value of each setting is suggested."""


@dataclass(frozen=True)
class Measured:
    """The result of a trial."""

    settings: SampleSettings
    metrics: Metrics
    seconds: float
    """Time of sampling, seconds an image."""


@dataclass
class Trials:
    """The trials of one search, which are stored so that a killed search goes on with the same suggestions.

    The journal has what was measured. What is suggested next comes from a study in memory with the same trials, whose
    constraint is that of this search: a search with another constraint uses the trials of the one before.

    Args:
        folder: Folder of the journal; no other process uses it.
        key: What decides the results of the trials: a search with another key has trials of its own.
        space: The settings that are searched.
        objective: What is searched for.
        seed: Random seed of the suggestions.
    """

    folder: Path
    key: Mapping[str, Any]
    space: Space
    objective: Objective
    seed: int
    _study: Study = field(init=False)

    def __post_init__(self) -> None:
        optuna = require_optuna()
        from movq_cli.commands.trial_journal import open_journal

        found = {"metrics": sorted(self.objective.names), "names": self.space.names}
        text = json.dumps({**self.key, **found, "base": self.space.base.model_dump()}, sort_keys=True)
        self._study = optuna.create_study(
            storage=open_journal(self.folder / JOURNAL),
            study_name=digests.of_bytes(text.encode()),
            direction=self.objective.direction,
            load_if_exists=True,
        )

    @property
    def measured(self) -> list[Measured]:
        """The trials, oldest first; the first one has the preset's settings."""
        return [
            Measured(
                SampleSettings.model_validate(trial.user_attrs["settings"]),
                trial.user_attrs["metrics"],
                trial.user_attrs["seconds"],
            )
            for trial in self._study.get_trials(deepcopy=False)
        ]

    @property
    def ranked(self) -> list[Measured]:
        """The trials, the best one first."""
        return sorted(self.measured, key=lambda trial: self.objective.order(trial.metrics))

    def run(self, measure: Callable[[SampleSettings], tuple[Metrics, float]]) -> Measured:
        """Make one more trial.

        Args:
            measure: Function that returns the metrics of settings, and the seconds an image.

        Raises:
            BadRequestError: A metric is not finite.
        """
        optuna = require_optuna()
        trial = self._suggestions().ask()
        settings = self.space.suggest(trial)
        metrics, seconds = measure(settings)
        for name, value in metrics.items():
            if not math.isfinite(value):
                what = f"{self.objective.names[name]} of {self.space.values(settings)}"
                raise BadRequestError(f"the {what} is not finite", "Sample more images: --n.")
        result = {"settings": settings.model_dump(), "metrics": dict(metrics), "seconds": seconds}
        self._study.add_trial(
            optuna.trial.create_trial(
                params=trial.params,
                distributions=trial.distributions,
                value=metrics[self.objective.metric],
                user_attrs=result,
            )
        )
        return Measured(settings, metrics, seconds)

    def _suggestions(self) -> Study:
        """Return a study in memory that has the trials with their constraint, and suggests the next one.

        The suggestion depends on the trials alone, so that it is the same after a killed process.
        """
        optuna = require_optuna()
        trials = self._study.get_trials()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=self.seed * 100_003 + len(trials), multivariate=True, n_startup_trials=8
            )
        study: Study = optuna.create_study(direction=self.objective.direction, sampler=sampler)
        for trial in trials:
            trial.set_constraint("violation", self.objective.violation(trial.user_attrs["metrics"]))
            study.add_trial(trial)
        if not trials:
            study.enqueue_trial(self.space.start)
        return study

    def confirmed(self, settings: SampleSettings, repeat: int, measure: Callable[[], Metrics]) -> Metrics:
        """Return the metrics of settings with other seeds, which are measured once and stored.

        Args:
            settings: The settings.
            repeat: Index of the seeds.
            measure: Function that returns the metrics.
        """
        name = f"{_CONFIRMED} {repeat} {json.dumps(settings.model_dump(), sort_keys=True)}"
        known: Metrics | None = self._study.user_attrs.get(name)
        if known is None:
            known = measure()
            self._study.set_user_attr(name, dict(known))
        return known


def require_optuna() -> Any:  # noqa: ANN401 - a module that may be missing
    """Return the module optuna, with its own log lines switched off.

    Raises:
        BadRequestError: It is not installed, or too old.
    """
    try:
        import optuna
    except ImportError:
        raise BadRequestError("--tune needs optuna", "Install it: pip install 'movq[tune]'.") from None
    if int(optuna.__version__.split(".")[0]) < _OPTUNA:
        raise BadRequestError(
            f"--tune needs optuna {_OPTUNA} or newer, not {optuna.__version__}",
            "Install it: pip install --upgrade 'movq[tune]'.",
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
