"""The interface between a rule and those who apply it, and what several rules compute."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from movq_cli.run_history import RunHistory, Series
from movq_cli.run_manifest import COMMAND, SECTIONS, Kind

FEWEST_VALIDATIONS = 3
"""Number of validations without which nothing is said about a trend: the first ones are of an untrained model."""

FEWEST_LINES = 8
"""Number of log lines without which nothing is said about the means of a training."""


class Symptom(NamedTuple):
    """The result of a rule that has found its problem in a run."""

    evidence: str
    """Sentence with the numbers and the step."""
    remedy: str
    """Command that trains without the problem."""
    step: int
    """Number of steps after which the evidence was recorded."""
    picture: Path | None = None
    """Picture that shows the evidence."""


Check = Callable[[RunHistory], Symptom | None]


@dataclass(frozen=True)
class Rule:
    """A problem that a run can have."""

    key: str
    """Name of the rule, in lower case with hyphens."""
    title: str
    """The problem in a few words."""
    why: str
    """Sentence that says why the threshold is the right one."""
    kinds: frozenset[Kind]
    """The kinds of runs to which the rule applies."""
    check: Check
    """Function that returns the symptom of a run; None if the run does not have the problem."""


def rule(key: str, title: str, why: str, *kinds: Kind) -> Callable[[Check], Rule]:
    """Make a rule of a function; without kinds it applies to every run."""
    return lambda check: Rule(key, title, why, frozenset(kinds or ("vq", "prior")), check)


def again(history: RunHistory, *settings: str) -> str:
    """Return the command that trains a new run like this one, with other settings (`NAME=VALUE`)."""
    return _command(history, ["--preset", str(history.run.folder / "settings.yaml")], settings)


def go_on(history: RunHistory, step: int, *settings: str) -> str:
    """Return the command that goes on in a new run with other settings, from the last checkpoint up to a step.

    Without such a checkpoint it trains from the start.
    """
    steps = [stored for stored in history.run.kept_steps() if stored <= step]
    if history.run.checkpoint.is_file() and history.manifest.step <= step:
        steps.append(history.manifest.step)
    usable = [stored for stored in steps if stored < history.manifest.steps]
    if not usable:
        return again(history, *settings)
    return _command(history, ["--from", f"{history.run.folder}@{max(usable)}"], settings)


def longer(history: RunHistory, factor: float, *settings: str) -> str:
    """Return the command that goes on with this run for more steps."""
    section = SECTIONS[history.manifest.kind]
    steps = round(history.manifest.steps * factor)
    length = [f"{section}.steps={steps}", f"{section}.epochs=null"]
    words = ["--preset", str(history.run.folder / "settings.yaml"), "--run", str(history.run.folder)]
    return _join(history, words, [*length, *settings])


def _command(history: RunHistory, words: list[str], settings: tuple[str, ...]) -> str:
    folder = history.run.folder
    new = next(path for number in range(2, 10**6) if not (path := folder.with_name(f"{folder.name}-{number}")).exists())
    return _join(history, [*words, "--run", str(new)], list(settings))


def _join(history: RunHistory, words: list[str], settings: list[str]) -> str:
    overrides = [part for setting in settings for part in ("-o", setting)]
    return shlex.join(["movq", COMMAND[history.manifest.kind], *words, *overrides])


def mean(series: Series, start: float = 0.0, stop: float = 1.0) -> float:
    """Return the mean of a part of a series, which is given by shares of its length."""
    count = len(series)
    values = series.values[int(start * count) : max(int(start * count) + 1, round(stop * count))]
    return sum(values) / len(values)
