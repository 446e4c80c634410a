"""What the training of both stages shares: steps, averages, logging, validation, checkpoints, resuming, stopping."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from movq_cli import checkpoints, signals
from movq_cli.console import Console
from movq_cli.errors import FailureError, InterruptedRunError
from movq_cli.files import atomic_write
from movq_cli.ranks import Ranks
from movq_cli.runs import Run, RunManifest, now
from movq_cli.settings import TrainSettings
from movq_cli.training.log import DeviceMetrics, Log, Metrics, Speed
from movq_cli.training.trainable import FiniteCheck, Stateful


class Stage(Protocol):
    """One stage's training: its models and what one step does. The loop owns the rest."""

    @property
    def settings(self) -> TrainSettings:
        """Rates, intervals and the seed."""

    @property
    def device(self) -> torch.device:
        """Where the models are."""

    @property
    def ranks(self) -> Ranks:
        """Which part of each batch is this process's."""

    @property
    def finite_check(self) -> FiniteCheck:
        """The check that every step is finite."""

    def batches(self, start: int) -> Iterator[Any]:
        """This rank's shares of the batches from a step on, without end."""

    def batch_names(self, step: int) -> list[str]:
        """The images of a step's whole batch."""

    def step(self, batch: Any, step: int) -> DeviceMetrics:  # noqa: ANN401 - each stage has its own batch
        """Update the models; the metrics are scalars that stay on the device."""

    def validate(self) -> Metrics:
        """Metrics on the validation split, with the weights that would be exported; the same on every rank."""

    def evaluate(self) -> Metrics:
        """FID on as many images as the settings say; the same on every rank."""

    def score(self, figures: Metrics) -> float:
        """How good a validation was, higher is better: the best one's weights are kept."""

    def parts(self) -> Mapping[str, Stateful]:
        """Everything that the next step depends on: models, optimisers, averages, counts."""

    def export(self, path: Path) -> None:
        """Write the inference weights."""

    def draw(self, run: Run, step: int) -> None:
        """Make the run's picture of this step."""


def train(
    stage: Stage, run: Run, manifest: RunManifest, console: Console, *, tflop_per_step: float | None = None
) -> Metrics:
    """Train a stage to its last step, from its last checkpoint if there is one.

    Args:
        stage: What is trained.
        run: Where rank 0 writes everything.
        manifest: As `runs.begin` gave it.
        console: For progress and log lines.
        tflop_per_step: A rank's arithmetic, to be held against its device's rate; None = that is not told.

    Returns:
        The last validation's figures.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM; a checkpoint was written first.
        FailureError: A step is no longer finite, or a file cannot be written; a checkpoint of the last good state was
            written first.
    """
    settings, steps, ranks = stage.settings, manifest.steps, stage.ranks
    keeper = _Keeper(stage, run, manifest)
    step = keeper.resume(console)
    figures: Metrics = {}
    speed = None if tflop_per_step is None else Speed.measured(tflop_per_step, stage.device, settings.precision)
    stop = threading.Event()
    batches = stage.batches(step)
    if step == steps:
        # Killed between its last checkpoint and its end.
        figures = stage.validate() | (stage.evaluate() if settings.evaluate_every else {})
        keeper.publish(step)
    with (
        Log(run, console, settings, ranks, manifest.steps, speed) as log,
        signals.on_stop_signal(stop.set, launched=ranks.world_size > 1),
        console.progress(steps, "training", "steps", done=step) as progress,
    ):
        while step < steps:
            # Each step draws from a generator state of its own: a resumed run draws what it would have.
            torch.manual_seed(step_seed(settings.seed, step))
            with log.waiting():
                batch = next(batches)
            metrics = stage.step(batch, step)
            step += 1
            log.add(metrics)
            stopping = ranks.any(stop.is_set() or ranks.is_orphaned)
            last = step == steps
            validate = last or step % settings.validate_every == 0
            evaluate = settings.evaluate_every > 0 and (last or step % settings.evaluate_every == 0)
            save = last or step % settings.checkpoint_every == 0 or stopping
            if validate or evaluate or save or step % settings.log_every == 0:
                _check(stage, keeper)
                log.flush(step)
            progress.advance(1, log.shown)
            if validate:
                figures = stage.validate()
                log.validation(step, figures)
                keeper.keep_best(step, stage.score(figures))
                if ranks.is_first:
                    stage.draw(run, step)
            if evaluate:
                found = stage.evaluate()
                log.validation(step, found)
                figures = {**figures, **found}
            if save:
                keeper.save(step)
            if validate or evaluate or save:
                log.restart_clock()
            if stopping and not last:
                raise InterruptedRunError(
                    f"stopped at step {step} of {steps}; a checkpoint is in {run.folder}",
                    "The same command goes on from there.",
                )
    return figures


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's draws, mixed from both: torch's CPU generator reads only 32 bits of what it is given."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def _check(stage: Stage, keeper: _Keeper) -> None:
    """End the run where a step was not finite; the models have not moved since."""
    failure = stage.finite_check.first_failure()
    if failure is None:
        return
    done, values = failure
    names = stage.batch_names(done)
    report = keeper.run.folder / "nonfinite.json"
    if stage.ranks.is_first:
        record = {"step": done + 1, "metrics": {name: str(value) for name, value in values.items()}, "batch": names}
        atomic_write(report, json.dumps(record, indent=1).encode())
    kept = (
        f"the state before it is the checkpoint in {keeper.run.folder}"
        if keeper.save_if_finite(done)
        else "the weights were not finite before it either, so the last checkpoint stays"
    )
    bad = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise FailureError(
        f"step {done + 1} is not finite ({bad or 'on another rank'}); {kept}. Its images were "
        f"{', '.join(names[:3])}{more}: all are in {report}",
        "Look at them, or go on with a lower base_learning_rate, with clip_norm=1 or with precision=float32 (-o).",
    )


def _is_finite(state: object) -> bool:
    """Whether all floats of a nested state are."""
    if isinstance(state, Tensor):
        return not state.is_floating_point() or bool(state.isfinite().all())
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return all(_is_finite(part) for part in parts)


class _Keeper:
    """What a run keeps: the last checkpoint, the weights, and the weights of its best validation."""

    def __init__(self, stage: Stage, run: Run, manifest: RunManifest) -> None:
        self.stage = stage
        self.run = run
        self.manifest = manifest

    def resume(self, console: Console) -> int:
        """Load the last checkpoint, if there is one; the steps already made."""
        if not self.run.checkpoint.exists():
            return 0
        state = checkpoints.load_state(self.run.checkpoint, torch.device("cpu"))
        for name, part in self.stage.parts().items():
            part.load_state_dict(state["stage"][name])
        step = int(state["step"])
        best = state["best"]
        self.manifest = self.manifest.model_copy(update={"best_step": best["step"], "best_score": best["score"]})
        console.log(f"going on from step {step} in {self.run.folder}")
        return step

    def keep_best(self, step: int, score: float) -> None:
        """Write the weights beside the last ones where no validation was better."""
        if self.manifest.best_score is not None and score <= self.manifest.best_score:
            return
        self.manifest = self.manifest.model_copy(update={"best_step": step, "best_score": score})
        if self.stage.ranks.is_first:
            self.stage.export(self.run.best)

    def save(self, step: int) -> None:
        """Write everything that the next step depends on, and the weights."""
        if not self.stage.ranks.is_first:
            return
        state = {name: part.state_dict() for name, part in self.stage.parts().items()}
        best = {"step": self.manifest.best_step, "score": self.manifest.best_score}
        checkpoints.save_state(self.run.checkpoint, {"step": step, "stage": state, "best": best})
        self.publish(step)

    def save_if_finite(self, step: int) -> bool:
        """Save, unless weights or averages are already beyond use; whether it was done."""
        finite = all(_is_finite(part.state_dict()) for part in self.stage.parts().values())
        if finite:
            self.save(step)
        return finite

    def publish(self, step: int) -> None:
        """The inference weights, and how far the run is."""
        if not self.stage.ranks.is_first:
            return
        self.stage.export(self.run.weights)
        finished = step >= self.manifest.steps
        status = "finished" if finished else "running"
        update = {"step": step, "status": status, "finished": now() if finished else None}
        self.run.write(self.manifest.model_copy(update=update))
