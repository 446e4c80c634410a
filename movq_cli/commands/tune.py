"""`movq sample --tune`: searches the settings of sampling with the lowest FID, and stores them beside the weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from movq_cli import devices, runs, signals
from movq_cli.api import Prior
from movq_cli.commands import tuning_picture
from movq_cli.commands.sample import SampleRequest, load_prior, merge_settings
from movq_cli.commands.trials import Measured, Space, Trials, require_optuna
from movq_cli.console import Console
from movq_cli.data import pixels, tuned_settings
from movq_cli.data.tuned_settings import TunedSettings
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.evaluation import extractors, references
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.files import cache_folder, is_writable, locked, sha256
from movq_cli.ranks import SINGLE_PROCESS
from movq_cli.settings import SampleSettings

REPEATS = 4
"""Number of other seeds with which the best settings and the preset's are compared."""

_REFERENCES = 50_000
"""Number of real images, at most, as for the FID during training."""

_SHOWN = 10
"""Number of trials in the table."""


@dataclass(frozen=True)
class TuneRequest:
    """The options of `movq sample --tune`."""

    sample: SampleRequest
    """The options that `movq sample` has too; `n` is the number of images of each FID, and `out` is not used."""
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


@dataclass
class Measure:
    """Samples images with settings, and measures their FID and the time.

    Args:
        prior: The prior.
        class_ids: Indices of the classes that the images take in turn; empty for an unconditional prior.
        request: Number of images, seed and batch size.
        evaluator: Evaluator against the real images.
        device: Device of the prior.
    """

    prior: Prior
    class_ids: Sequence[int]
    request: SampleRequest
    evaluator: FIDEvaluator
    device: torch.device
    _seconds: float = field(init=False, default=0.0)

    def __call__(self, settings: SampleSettings, first: int = 0) -> tuple[float, float]:
        """Return the FID of images, and the seconds that sampling one of them took.

        Args:
            settings: Settings of sampling.
            first: Index of the first image.
        """
        self._seconds = 0.0
        fid = self.evaluator.fid(self._images(settings, first))
        return fid, self._seconds / self.request.n

    def warm_up(self, settings: SampleSettings) -> None:
        """Sample one batch, whose time is not representative."""
        next(iter(self._images(settings, 0)))

    def _images(self, settings: SampleSettings, first: int) -> Iterator[Tensor]:
        count, size = self.request.n, self.request.batch_size
        for start in range(first, first + count, size):
            began = time.perf_counter()
            indices = range(start, min(start + size, first + count))
            drawn = self.prior.sample(
                seed=self.request.seed, classes=self.class_ids, settings=settings, indices=indices
            )
            batch = pixels.to_bytes(drawn)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._seconds += time.perf_counter() - began
            yield batch


def tune(request: TuneRequest, console: Console) -> None:
    """Search the settings of sampling with the lowest FID, and store them if they are better than the preset's.

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
    folder = weights.parent / "tuning"
    if not is_writable(weights.parent):
        raise FailureError(f"{weights.parent} cannot be written, and the settings are stored there", "Copy the run.")
    with signals.interruptible("the finished trials", launched=False), locked(folder, "movq sample --tune"):
        prior = load_prior(weights, sample, device)
        base = merge_settings(prior, sample.settings, {})
        space = Space.of(prior, base, sample.settings, can_guide=_can_guide(prior, weights))
        real = _Real.of(request, weights)
        evaluator = real.evaluator(request, prior, device, console)
        measure = Measure(prior, prior.class_ids(sample.classes), sample, evaluator, device)
        key = {
            "prior": sha256(weights),
            "tokenizer": None if prior.tokenizer_file is None else sha256(prior.tokenizer_file),
            "real": [real.location, real.split],
            "inception": evaluator.inception.digest,
            "images": sample.n,
            "seed": sample.seed,
            "classes": list(measure.class_ids),
        }
        trials = Trials(folder, key, space, sample.seed)
        _search(trials, measure, request, console)
        tuned = _confirm(trials, measure, key, real, console)
    path = tuned_settings.write(weights, tuned)
    picture = folder / f"{weights.stem}.png"
    tuning_picture.save(picture, trials.measured, tuned)
    _report(trials, tuned, path, picture, console)


@dataclass(frozen=True)
class _Real:
    """The real images with which samples are compared."""

    location: str
    split: Literal["train", "val"] | None

    @classmethod
    def of(cls, request: TuneRequest, weights: Path) -> _Real:
        """Return the requested set, or the prepared set of the run.

        Raises:
            BadRequestError: No set is named, and the run folder does not tell one.
        """
        if request.against is not None:
            return cls(request.against, request.split)
        try:
            data = runs.Run(weights.parent, "prior").read().settings.data.path
        except BadRequestError:
            data = None
        if data is None or not Path(data).is_dir():
            where = f"at {data}" if data is not None else "in the manifest of the run"
            raise BadRequestError(f"the prepared set of {weights.parent} is not {where}", "Name it: --against SET.")
        return cls(str(data), request.split)

    def evaluator(self, request: TuneRequest, prior: Prior, device: torch.device, console: Console) -> FIDEvaluator:
        """Return the evaluator against these images; their features are cached."""
        reference = references.find_reference(self.location, cache_folder())
        if reference is not None:
            inception = extractors.load_inception(request.weights, device)
            references.warn_of_other_weights(reference, inception, console)
            console.log(f"real images: the statistics {reference.path}")
            return FIDEvaluator(inception, reference.on(torch.device("cpu")), device, SINGLE_PROCESS)
        size = prior.tokenizer.settings.image_size
        images = ImageSet("real", self.location, self.split or "train", crop=size, limit=_REFERENCES, console=console)
        reason = ", as published FIDs of samples use" if images.split == "train" else ""
        split = "" if images.split is None else f" of the split {images.split}{reason}"
        console.log(f"real images: {len(images)}{split} in {self.location}")
        return FIDEvaluator.of(images, cache_folder(), request.weights, device, SINGLE_PROCESS, console)


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
    found = trials.measured
    if found:
        console.log(f"{len(found)} trials are already in {trials.folder}")
    began, spent = time.monotonic(), 0
    if request.budget is None or len(found) < request.budget:
        measure.warm_up(trials.space.base)

    def has_time() -> bool:
        if request.minutes is None or not trials.measured:
            return True
        elapsed = time.monotonic() - began
        each = elapsed / spent if spent else 0.0
        # The comparison at the end takes as long as this number of trials.
        return elapsed + (1 + 2 * REPEATS) * each < 60 * request.minutes

    by_time = request.budget is None
    total = round(60 * (request.minutes or 0)) if by_time else request.budget or 0
    with console.progress(total, "tuning", "seconds" if by_time else "trials", 0 if by_time else len(found)) as bar:
        shown = 0
        while (by_time or len(found) < (request.budget or 0)) and has_time():
            new = trials.run(measure)
            spent += 1
            found = trials.measured
            best = min(found, key=lambda trial: trial.fid)
            elapsed = round(time.monotonic() - began)
            bar.advance(elapsed - shown if by_time else 1, {"FID": f"{new.fid:.4g}", "best": f"{best.fid:.4g}"})
            shown = elapsed


def _confirm(trials: Trials, measure: Measure, key: Mapping[str, Any], real: _Real, console: Console) -> TunedSettings:
    """Compare the best settings and the preset's with other seeds, and return the result."""
    found = trials.measured
    preset, best = found[0], min(found, key=lambda trial: trial.fid)
    is_same = best.settings == preset.settings
    fids: dict[str, list[float]] = {"best": [], "preset": []}
    rivals = {} if is_same else {"best": best, "preset": preset}
    with console.progress(REPEATS * len(rivals), "other seeds", "FIDs") as progress:
        for repeat in range(1, REPEATS + 1):
            for name, rival in rivals.items():
                fids[name].append(_fid_of(trials, measure, rival, repeat))
                progress.advance(values={name: f"{fids[name][-1]:.4g}"})
    return TunedSettings(
        prior=key["prior"],
        is_better=not is_same and is_beyond_spread(fids["best"], fids["preset"]),
        best=trials.space.values(best.settings),
        preset=trials.space.values(preset.settings),
        fixed=dict(measure.request.settings),
        best_fids=tuple(fids["best"]),
        preset_fids=tuple(fids["preset"]),
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


def _fid_of(trials: Trials, measure: Measure, trial: Measured, repeat: int) -> float:
    first = repeat * measure.request.n
    return trials.confirmed(trial.settings, repeat, lambda: measure(trial.settings, first)[0])


def is_beyond_spread(best: Sequence[float], preset: Sequence[float]) -> bool:
    """Return whether the mean of some FIDs is lower than that of others by more than the spread of a difference.

    The spread is the standard deviation of the difference of one FID of each, so that the means differ by several times
    their own standard error.
    """
    spread = (statistics.variance(best) + statistics.variance(preset)) ** 0.5
    return statistics.mean(preset) - statistics.mean(best) > spread


def _verdict(tuned: TunedSettings) -> str:
    """Return one sentence about the comparison with other seeds."""
    if not tuned.best_fids:
        return "no settings had a lower FID than the preset's, which stay in use"
    means = [statistics.mean(fids) for fids in (tuned.best_fids, tuned.preset_fids)]
    spreads = [statistics.stdev(fids) for fids in (tuned.best_fids, tuned.preset_fids)]
    values = (
        f"with {REPEATS} other seeds, FID {means[0]:.4g} ± {spreads[0]:.2g} with the best settings and "
        f"{means[1]:.4g} ± {spreads[1]:.2g} with the preset's"
    )
    if tuned.is_better:
        return f"{values}: `movq sample` now uses the best settings"
    return f"{values}: the difference is within the spread, and the preset's settings stay in use"


def _report(trials: Trials, tuned: TunedSettings, path: Path, picture: Path, console: Console) -> None:
    """Print the best trials and the preset's, and say what the comparison has shown."""
    found = trials.measured
    ranked = sorted(found, key=lambda trial: trial.fid)
    shown = ranked[:_SHOWN] + ([] if found[0] in ranked[:_SHOWN] else [found[0]])
    columns = ["rank", "FID", "ms/image", *trials.space.names, ""]
    rows = [
        [
            str(ranked.index(trial) + 1),
            f"{trial.fid:.5g}",
            f"{1000 * trial.seconds:.3g}",
            *("all" if value is None else str(value) for value in trials.space.values(trial.settings).values()),
            "preset" if trial is found[0] else "",
        ]
        for trial in shown
    ]
    result = {
        "path": str(path),
        "picture": str(picture),
        "verdict": _verdict(tuned),
        **tuned.model_dump(mode="json", exclude={"digest"}),
        "measured": [
            {"fid": trial.fid, "seconds": trial.seconds, "settings": trials.space.values(trial.settings)}
            for trial in ranked
        ],
    }
    console.table(result, columns, rows)
    console.log(_verdict(tuned))
    console.log(f"settings: {path}; FID against time: {picture}")
