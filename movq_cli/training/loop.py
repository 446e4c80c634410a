"""The training loop of both stages: steps, logging, validation, checkpoints, resuming and stopping."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from movq_cli import signals
from movq_cli.console import Console
from movq_cli.errors import FailureError, InterruptedRunError
from movq_cli.files import atomic_write
from movq_cli.run_manifest import RunManifest
from movq_cli.runs import Run
from movq_cli.training.checkpointer import Checkpointer
from movq_cli.training.log import Log, Metrics, Speed
from movq_cli.training.monitor import Monitor
from movq_cli.training.rewind import rewind
from movq_cli.training.stage import Stage
from movq_cli.training.validator import Due, Validator
from movq_cli.training.watch import StoppedValidationError, Watch


def train(
    stage: Stage,
    run: Run,
    manifest: RunManifest,
    console: Console,
    *,
    tflop_per_step: float | None = None,
    session: Mapping[str, Any] | None = None,
) -> Metrics:
    """Train a stage to its last step or early stop, starting from its last checkpoint if there is one.

    Args:
        stage: Stage to train.
        run: Run folder, to which rank 0 writes all files.
        manifest: Manifest of the run, as `runs.start_or_resume` returned it.
        console: Console for progress and log lines.
        tflop_per_step: Arithmetic of one step on one rank, in units of 1e12 floating-point operations, to compare with
            the rate of the device's matrix products; None omits this comparison.
        session: What this process is, for the log: its command, its device, the size of the model.

    Returns:
        The metrics of the last validation and evaluation.

    Raises:
        InterruptedRunError: The process received one of `signals.STOP_SIGNALS`; it wrote a checkpoint first.
        FailureError: The metrics of a step are not finite, the ranks have unequal weights, or a file cannot be
            written. In the first case the last good state was written as a checkpoint first.
    """
    settings, steps, ranks = stage.settings, manifest.steps, stage.ranks
    checkpointer = Checkpointer(stage, run, manifest)
    step = checkpointer.resume(console)
    stop = threading.Event()
    # The run was killed between its last checkpoint and its end.
    is_complete = step >= steps or checkpointer.stops_early
    repeats_validation = is_complete or checkpointer.validation_is_missing
    _rewind(stage, run, step, console, repeats_validation=repeats_validation or step == 0)
    speed = None
    if tflop_per_step is not None and not is_complete:
        speed = Speed.measured(tflop_per_step, stage.device, settings.precision)
    console.log(f"loss = {stage.loss_formula}")
    monitor = Monitor(run, settings, console, is_first=ranks.is_first)
    with (
        Log(run, console, settings, ranks, steps, speed, done=step, session=session) as log,
        signals.on_stop_signal(stop.set, launched=ranks.world_size > 1),
        console.progress(steps, "training", "steps", done=min(step, steps)) as progress,
    ):

        def stops() -> bool:
            return stop.is_set() or ranks.is_orphaned

        validator = Validator(stage, run, log, checkpointer, Watch(console, ranks, stops))
        if repeats_validation:
            _finish_step(validator, monitor, step, Due.after(stage, step, steps, is_stopping=True), steps)
        elif step == 0 and stage.validates_first:
            evaluation = stage.evaluation_interval > 0
            _finish_step(validator, monitor, step, Due(True, evaluation, checkpoint=False, log_line=False), steps)
        batches, is_healthy = stage.batches(step), True
        while step < steps and not checkpointer.stops_early:
            _step(stage, batches, step, log, console)
            step += 1
            is_stopping = ranks.any(stops())
            due = Due.after(stage, step, steps, is_stopping=is_stopping)
            if any(due):
                _check_finite(stage, run, checkpointer)
                if due.validation or due.checkpoint:
                    checkpointer.require_same_state(step)
                is_healthy = _warn(stage, step, log.flush(step), console, was_healthy=is_healthy)
            progress.advance(1, log.shown)
            _finish_step(validator, monitor, step, due, steps)
            if is_stopping and step < steps and not checkpointer.stops_early:
                raise _interrupted(run, step, steps)
    if step < steps:
        _tell_early_stop(run, checkpointer.manifest, step, console)
    return validator.metrics


def _rewind(stage: Stage, run: Run, step: int, console: Console, *, repeats_validation: bool) -> None:
    """Remove the log of the steps that are made again; damage, and a log that cannot be changed, cost a warning."""
    if not stage.ranks.is_first:
        return
    try:
        damaged = rewind(run, step, repeats_validation=repeats_validation)
    except (OSError, FailureError) as error:
        console.warn(f"the log of the steps after step {step} stays, and is written again: {error}")
        return
    if damaged:
        console.warn(f"{run.log} had {damaged} damaged lines, which were removed")


def _step(stage: Stage, batches: Iterator[Any], step: int, log: Log, console: Console) -> None:
    """Make the step of this index."""
    if event := stage.event(step):
        console.log(f"step {step}: {event}")
    # Each step seeds the generator anew, so that a resumed run draws the same random numbers.
    torch.manual_seed(step_seed(stage.settings.seed, step))
    with log.waiting():
        batch = next(batches)
    log.add(stage.step(batch, step))


def _finish_step(validator: Validator, monitor: Monitor, step: int, due: Due, steps: int) -> None:
    """Validate, evaluate and save what is due after a step, and show the result.

    Raises:
        InterruptedRunError: The validation was stopped; the checkpoint says that it is missing.
    """
    checkpointer = validator.checkpointer
    try:
        validator.validate(step, due)
    except StoppedValidationError:
        checkpointer.validation_is_missing = True
        checkpointer.save(step)
        raise _interrupted(validator.run, step, steps) from None
    checkpointer.validation_is_missing = False
    is_last = step >= steps or checkpointer.stops_early
    if due.checkpoint or is_last:
        validator.log.sync()
        checkpointer.save(step)
    if due.validation:
        monitor.observe(is_last=is_last)
    if due.validation or due.evaluation or due.checkpoint:
        validator.log.restart_clock()


def _tell_early_stop(run: Run, manifest: RunManifest, step: int, console: Console) -> None:
    """Say that a run stopped early, and which weights are its best ones."""
    console.log(
        f"stopped early at step {step} of {manifest.steps}: {manifest.best_by} was not better than at step "
        f"{manifest.best_step} in {manifest.validations_since_best} validations; the weights of step "
        f"{manifest.best_step} are in {run.best}, for other commands --weights-of best"
    )


def _interrupted(run: Run, step: int, steps: int) -> InterruptedRunError:
    message = f"stopped at step {step} of {steps}; a checkpoint is in {run.folder}"
    return InterruptedRunError(message, "Run the same command again to resume.")


def _warn(stage: Stage, step: int, means: Mapping[str, float], console: Console, *, was_healthy: bool) -> bool:
    """Return whether the stage has no warning about these means; print a warning that it did not have before."""
    if not means:
        return was_healthy
    text = stage.warning(step, means)
    if text is not None and was_healthy:
        console.warn(f"step {step}: {text}")
    return text is None


def step_seed(seed: int, step: int) -> int:
    """Return the seed of one step's random numbers.

    Seed and step are hashed together, because torch's CPU generator uses only 32 bits of its seed.
    """
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


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
