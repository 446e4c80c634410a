"""The training loop of both stages: steps, logging, validation, checkpoints, resuming and stopping."""

from __future__ import annotations

import json
import math
import threading
from typing import NamedTuple, Self

import numpy as np
import torch

from movq_cli import signals
from movq_cli.console import Console
from movq_cli.errors import FailureError, InterruptedRunError
from movq_cli.files import atomic_write
from movq_cli.runs import Run, RunManifest
from movq_cli.settings import TrainSettings
from movq_cli.training.checkpointer import Checkpointer
from movq_cli.training.log import Log, Metrics, Speed
from movq_cli.training.stage import Stage


def train(
    stage: Stage, run: Run, manifest: RunManifest, console: Console, *, tflop_per_step: float | None = None
) -> Metrics:
    """Train a stage to its last step, starting from its last checkpoint if there is one.

    Args:
        stage: Stage to train.
        run: Run folder, to which rank 0 writes all files.
        manifest: Manifest of the run, as `runs.start_or_resume` returned it.
        console: Console for progress and log lines.
        tflop_per_step: Arithmetic of one step on one rank, in units of 1e12 floating-point operations, to compare with
            the rate of the device's matrix products; None omits this comparison.

    Returns:
        The metrics of the last validation; empty if no step was left to do.

    Raises:
        InterruptedRunError: The process received SIGINT, SIGTERM or SIGHUP; it wrote a checkpoint first.
        FailureError: The metrics of a step are not finite, the ranks have unequal weights, or a file cannot be
            written. In the first case the last good state was written as a checkpoint first.
    """
    settings, steps, ranks = stage.settings, manifest.steps, stage.ranks
    checkpointer = Checkpointer(stage, run, manifest)
    step = checkpointer.resume(console)
    if step == steps:  # The run was killed between its last checkpoint and its end.
        metrics = {**stage.validate(), **(stage.evaluate() if settings.evaluate_every else {})}
        checkpointer.publish(step)
        return metrics
    speed = None if tflop_per_step is None else Speed.measured(tflop_per_step, stage.device, settings.precision)
    stop, batches = threading.Event(), stage.batches(step)
    metrics = {}
    with (
        Log(run, console, settings, ranks, steps, speed) as log,
        signals.on_stop_signal(stop.set, launched=ranks.world_size > 1),
        console.progress(steps, "training", "steps", done=step) as progress,
    ):
        while step < steps:
            # Each step seeds the generator anew, so that a resumed run draws the same random numbers.
            torch.manual_seed(step_seed(settings.seed, step))
            with log.waiting():
                batch = next(batches)
            log.add(stage.step(batch, step))
            step += 1
            is_stopping = ranks.any(stop.is_set() or ranks.is_orphaned)
            due = _Due.after(step, steps, settings, is_stopping=is_stopping)
            if any(due):
                _check_finite(stage, run, checkpointer)
                if due.validation or due.checkpoint:
                    checkpointer.require_same_state(step)
                log.flush(step)
            progress.advance(1, log.shown)
            metrics = _measure(stage, run, step, due, log, checkpointer, metrics)
            if due.checkpoint:
                checkpointer.save(step)
            if due.validation or due.evaluation or due.checkpoint:
                log.restart_clock()
            if is_stopping and step < steps:
                message = f"stopped at step {step} of {steps}; a checkpoint is in {run.folder}"
                raise InterruptedRunError(message, "Run the same command again to resume.")
    return metrics


def step_seed(seed: int, step: int) -> int:
    """Return the seed of one step's random numbers.

    Seed and step are hashed together, because torch's CPU generator uses only 32 bits of its seed.
    """
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


class _Due(NamedTuple):
    """The tasks that are due after a step."""

    validation: bool
    evaluation: bool
    checkpoint: bool
    log_line: bool

    @classmethod
    def after(cls, step: int, steps: int, settings: TrainSettings, *, is_stopping: bool) -> Self:
        """Return the tasks after `step` of `steps` steps; a validation and a checkpoint end the run."""
        is_last = step == steps
        return cls(
            validation=is_last or step % settings.validate_every == 0,
            evaluation=settings.evaluate_every > 0 and (is_last or step % settings.evaluate_every == 0),
            checkpoint=is_last or step % settings.checkpoint_every == 0 or is_stopping,
            log_line=step % settings.log_every == 0,
        )


def _measure(
    stage: Stage, run: Run, step: int, due: _Due, log: Log, checkpointer: Checkpointer, metrics: Metrics
) -> Metrics:
    """Validate and evaluate if they are due, and return the newest metrics."""
    if due.validation:
        metrics = stage.validate()
        log.validation(step, metrics)
        checkpointer.save_best(step, stage.score(metrics))
        if stage.ranks.is_first:
            stage.draw(run, step)
    if due.evaluation:
        distances = stage.evaluate()
        log.validation(step, distances)
        metrics = {**metrics, **distances}
    return metrics


def _check_finite(stage: Stage, run: Run, checkpointer: Checkpointer) -> None:
    """End the run if the metrics of a step were not finite; the models have not changed since that step."""
    failure = stage.finite_check.first_failure()
    if failure is None:
        return
    done, values = failure
    checkpointer.require_same_state(done)
    names = stage.batch_names(done)
    report = run.folder / "nonfinite.json"
    if stage.ranks.is_first:
        record = {"step": done + 1, "metrics": {name: str(value) for name, value in values.items()}, "batch": names}
        atomic_write(report, json.dumps(record, indent=1).encode())
    state = (
        f"the state before it is the checkpoint in {run.folder}"
        if checkpointer.save_if_finite(done)
        else "the weights were not finite before it either, so the last checkpoint stays"
    )
    not_finite = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise FailureError(
        f"step {done + 1} is not finite ({not_finite or 'on another rank'}); {state}. Its images were "
        f"{', '.join(names[:3])}{more}; {report} lists all of them",
        "Inspect them, or resume with a lower base_learning_rate, with clip_norm=1 or with precision=float32 (-o).",
    )
