"""`movq sample --tune`: searches the best settings of sampling, and stores them beside the weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from movq_cli import devices, runs, signals
from movq_cli.api import Prior
from movq_cli.commands import tuning_picture
from movq_cli.commands.sample import SampleRequest, load_prior, merge_settings
from movq_cli.commands.trials import Measured, Space, Trials, require_optuna
from movq_cli.commands.tuning_measure import Measure, RealImages
from movq_cli.commands.tuning_objectives import LowestFID, Metrics, Objective, PrecisionAtRecall, values_of
from movq_cli.console import Console
from movq_cli.data import tuned_settings
from movq_cli.data.tuned_settings import TunedSettings
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import is_writable, locked, sha256

REPEATS = 4
"""Number of other seeds with which the best settings and the preset's are compared."""

_SHOWN = 10
"""Number of trials in the table."""


@dataclass(frozen=True)
class TuneRequest:
    """The options of `movq sample --tune`."""

    sample: SampleRequest
    """The options that `movq sample` has too; `n` is the number of images of each trial, and `out` is not used."""
    budget: int | None
    """Number of trials in all; None = as many as the minutes allow."""
    minutes: float | None
    """Minutes of this process; None = no limit."""
    against: str | None
    """Location of the real images or of their statistics; None = the prepared set of the run."""
    split: Literal["train", "val"]
    """Split of a prepared set."""
    weights: Path | None
    """Folder of pretrained weights, searched before torch hub's; None = torch hub's alone."""
    min_recall: float | None = None
    """Lowest recall of a search for the highest precision; None = the search is for the lowest FID."""

    @property
    def objective(self) -> Objective:
        """The objective of the search."""
        return LowestFID() if self.min_recall is None else PrecisionAtRecall(self.min_recall)


def tune(request: TuneRequest, console: Console) -> None:
    """Search the best settings of sampling, and store them with whether they are better than the preset's.

    Args:
        request: Options of the command.
        console: Console for the progress and the table of the best trials.

    Raises:
        BadRequestError: optuna is not installed, the prior does not have fixed settings, there are no real images, or
            Inception's weights are missing.
        FailureError: A file cannot be written.
        InterruptedRunError: The process received SIGINT, SIGTERM or SIGHUP; the finished trials are kept.
    """
    require_optuna()
    tuning_picture.require_matplotlib()
    sample = request.sample
    device = devices.select(sample.device_name)
    weights = runs.find_weights(sample.run, "prior")
    console.log(f"prior: {weights}")
    folder = weights.parent / tuned_settings.SEARCH
    if not is_writable(weights.parent):
        raise FailureError(f"{weights.parent} cannot be written, and the settings are stored there", "Copy the run.")
    with signals.interruptible("the finished trials", launched=False), locked(folder, "movq sample --tune"):
        prior = load_prior(weights, sample, device)
        base = merge_settings(prior, sample.settings, {})
        space = Space.of(prior, base, sample.settings, can_guide=_can_guide(prior, weights))
        real = RealImages.of(request.against, request.split, weights)
        size = prior.tokenizer.settings.image_size
        evaluator = real.evaluator(request.objective, size, request.weights, device, console)
        measure = Measure(prior, prior.class_ids(sample.classes), sample, evaluator, device)
        key = {
            "prior": sha256(weights),
            "tokenizer": None if prior.tokenizer_file is None else sha256(prior.tokenizer_file),
            "real": evaluator.real,
            "inception": evaluator.inception.digest,
            "images": sample.n,
            "seed": sample.seed,
            "classes": list(measure.class_ids),
        }
        trials = Trials(folder, key, space, request.objective, sample.seed)
        _search(trials, measure, request, console)
        tuned = _compare(trials, measure, key, request, real, console)
    path = tuned_settings.write(weights, tuned)
    picture = folder / f"{weights.stem}.png"
    tuning_picture.save(picture, trials.measured, tuned)
    _report(trials, tuned, path, picture, console)


def _can_guide(prior: Prior, weights: Path) -> bool:
    """Return whether guidance works: the prior has classes, and was trained without them for a share of the images."""
    if not prior.classes:
        return False
    try:
        return runs.Run(weights.parent, "prior").read().settings.train_prior.label_dropout > 0
    except BadRequestError:  # The weights alone are enough to sample.
        return True


def _search(trials: Trials, measure: Measure, request: TuneRequest, console: Console) -> None:
    """Make trials until the budget or the time is used; the preset's settings are tried in any case."""
    done = len(trials.measured)
    if done:
        console.log(f"{done} trials are already in {trials.folder}")
    began, spent = time.monotonic(), 0
    if request.budget is None or done < request.budget:
        measure.warm_up(trials.space.base)
    # The comparison at the end takes as long as this number of trials.
    compared = REPEATS * (1 + trials.objective.candidates)

    def has_time() -> bool:
        if request.minutes is None or not done + spent:
            return True
        elapsed = time.monotonic() - began
        each = elapsed / spent if spent else 0.0
        return elapsed + (1 + compared) * each < 60 * request.minutes

    by_time = request.budget is None
    total = round(60 * (request.minutes or 0)) if by_time else max(request.budget or 0, done)
    with console.progress(total, "tuning", "seconds" if by_time else "trials", 0 if by_time else done) as bar:
        shown = 0
        while (by_time or done + spent < (request.budget or 0)) and has_time():
            new = trials.objective.describe(trials.run(measure).metrics)
            if not done + spent:
                console.log(f"with the preset's settings: {_listed(new)}")
            spent += 1
            best = trials.objective.describe(trials.ranked[0].metrics)
            elapsed = round(time.monotonic() - began)
            bar.advance(elapsed - shown if by_time else 1, {**new, **{f"best {name}": best[name] for name in best}})
            shown = elapsed


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _compare(
    trials: Trials, measure: Measure, key: Mapping[str, Any], request: TuneRequest, real: RealImages, console: Console
) -> TunedSettings:
    """Compare the best settings and the preset's with other seeds, and return the result.

    Settings that no longer meet the constraint of the search give way to the next best ones.
    """
    found, ranked, objective = trials.measured, trials.ranked, trials.objective
    preset, best = found[0], ranked[0]
    ahead = takewhile(lambda trial: trial.settings != preset.settings, ranked)
    candidates = [trial for trial in ahead if objective.violation(trial.metrics) <= 0][: objective.candidates]
    of_best: list[Metrics] = []
    of_preset: list[Metrics] = []
    for candidate in candidates:
        repeats, of_preset = _with_other_seeds(trials, measure, candidate, preset, console)
        is_met = objective.is_met(repeats)
        if is_met or not of_best:
            best, of_best = candidate, repeats
        if is_met:
            break
    return TunedSettings(
        prior=key["prior"],
        is_better=bool(of_best) and objective.is_better(of_best, of_preset),
        best=trials.space.values(best.settings),
        preset=trials.space.values(preset.settings),
        fixed=dict(measure.request.settings),
        min_recall=request.min_recall,
        **{f"best_{name}s": tuple(values_of(of_best, name)) for name in objective.names},
        **{f"preset_{name}s": tuple(values_of(of_preset, name)) for name in objective.names},
        best_seconds=best.seconds,
        preset_seconds=preset.seconds,
        trials=len(found),
        images=measure.request.n,
        seed=measure.request.seed,
        against=real.location,
        split=real.split,
        inception=key["inception"],
        device=devices.describe(measure.device),
        date=runs.now(),
    )


def _with_other_seeds(
    trials: Trials, measure: Measure, best: Measured, preset: Measured, console: Console
) -> tuple[list[Metrics], list[Metrics]]:
    """Return the metrics of the best settings and of the preset's with each of the other seeds."""
    found: dict[str, list[Metrics]] = {"best": [], "preset": []}
    with console.progress(2 * REPEATS, "other seeds", "measurements") as progress:
        for repeat in range(1, REPEATS + 1):
            for name, trial in (("best", best), ("preset", preset)):
                found[name].append(_measured_once(trials, measure, trial, repeat))
                described = trials.objective.describe(found[name][-1])
                progress.advance(values={f"{name} {key}": value for key, value in described.items()})
    return found["best"], found["preset"]


def _measured_once(trials: Trials, measure: Measure, trial: Measured, repeat: int) -> Metrics:
    first = repeat * measure.request.n
    return trials.confirmed(trial.settings, repeat, lambda: measure(trial.settings, first)[0])


def _verdict(trials: Trials, tuned: TunedSettings) -> str:
    """Return one sentence about the comparison with other seeds."""
    objective = trials.objective
    best, preset = tuned.repeats("best"), tuned.repeats("preset")
    if not best:
        return objective.nothing_found(trials.ranked[0].metrics)
    values = (
        f"with {REPEATS} other seeds, {objective.describe_spread(best)} with the best settings and "
        f"{objective.describe_spread(preset)} with the preset's"
    )
    if tuned.is_better:
        return f"{values}: `movq sample` now uses the best settings"
    return f"{values}: {objective.not_better(best)}, and the preset's settings stay in use"


def _report(trials: Trials, tuned: TunedSettings, path: Path, picture: Path, console: Console) -> None:
    """Print the best trials and the preset's, and say what the comparison has shown."""
    ranked, preset, objective = trials.ranked, trials.measured[0], trials.objective
    shown = ranked[:_SHOWN] + ([] if preset in ranked[:_SHOWN] else [preset])
    columns = ["rank", *objective.names.values(), "ms/image", *trials.space.names, ""]
    rows = [
        [
            str(ranked.index(trial) + 1),
            *(f"{trial.metrics[name]:.5g}" for name in objective.names),
            f"{1000 * trial.seconds:.3g}",
            *("all" if value is None else str(value) for value in trials.space.values(trial.settings).values()),
            "preset" if trial == preset else "",
        ]
        for trial in shown
    ]
    verdict = _verdict(trials, tuned)
    result = {
        "path": str(path),
        "picture": str(picture),
        "verdict": verdict,
        **tuned.model_dump(mode="json", exclude={"digest"}),
        "measured": [
            {**trial.metrics, "seconds": trial.seconds, "settings": trials.space.values(trial.settings)}
            for trial in ranked
        ],
    }
    console.table(result, columns, rows)
    console.log(verdict)
    console.log(f"settings: {path}; {tuning_picture.title(tuned)}: {picture}")
