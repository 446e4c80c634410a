"""The validations and evaluations of a training run: which are due, what is logged, and which weights are the best."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Self

from movq_cli.errors import FailureError
from movq_cli.runs import Run
from movq_cli.training.checkpointer import Checkpointer
from movq_cli.training.log import Log, Metrics
from movq_cli.training.stage import Stage
from movq_cli.training.watch import Watch


class Due(NamedTuple):
    """The tasks that are due after a step."""

    validation: bool
    evaluation: bool
    checkpoint: bool
    log_line: bool

    @classmethod
    def after(cls, stage: Stage, step: int, steps: int, *, is_stopping: bool) -> Self:
        """Return the tasks after `step` of `steps` steps; a validation and a checkpoint end the run."""
        settings, interval = stage.settings, stage.evaluation_interval
        is_last = step >= steps
        return cls(
            validation=is_last or step % settings.validate_every == 0,
            evaluation=interval > 0 and (is_last or step % interval == 0),
            checkpoint=is_last or step % settings.checkpoint_every == 0 or step in stage.milestones or is_stopping,
            log_line=step % settings.log_every == 0,
        )


class Validator:
    """Validates and evaluates a stage, logs the metrics, draws the pictures, and saves the best weights.

    Args:
        stage: Stage in training.
        run: Run folder, which receives the pictures.
        log: Log of the metrics.
        checkpointer: Checkpointer, which saves the best weights.
        watch: Watch that shows the progress, and ends a validation if the training is to stop.
    """

    def __init__(self, stage: Stage, run: Run, log: Log, checkpointer: Checkpointer, watch: Watch) -> None:
        self.stage = stage
        self.run = run
        self.log = log
        self.checkpointer = checkpointer
        self.watch = watch
        self.metrics: Metrics = {}
        """The metrics of the last validation and of the last evaluation."""
        self._average_is_behind = stage.has_average

    def validate(self, step: int, due: Due) -> None:
        """Carry out what is due after a step.

        Raises:
            StoppedValidationError: The training is to stop; what is due has to be done again.
        """
        measured: Metrics = {}
        if due.validation:
            measured = self.stage.validate(self.watch)
            self.log.validation(step, measured, self._raw(measured))
            if self.stage.ranks.is_first:
                self._draw(step)
        if due.evaluation:
            distances = self.stage.evaluate(self.watch)
            self.log.validation(step, distances)
            measured = {**measured, **distances}
        criterion = self.stage.criterion.metric
        if criterion in measured:
            # Ranks that disagreed on an early stop would wait for each other without end.
            value = self.stage.ranks.from_first(partial(measured.__getitem__, criterion))
            measured = {**measured, criterion: value}
        self.checkpointer.save_best(step, measured)
        self.metrics = {**self.metrics, **measured}

    def _draw(self, step: int) -> None:
        """Draw the picture of a step; a picture that cannot be written costs a warning and not the run."""
        try:
            self.stage.draw(self.run, step)
            self.log.picture(step)
        except FailureError as error:
            self.log.console.warn(f"step {step} has no picture: {error}")

    def _raw(self, averaged: Metrics) -> Metrics | None:
        """Validate the weights of the last step too, until the average is as good: after many steps it always is."""
        if not self._average_is_behind:
            return None
        raw = self.stage.validate(self.watch, averaged=False)
        criterion = self.stage.validation_criterion
        value, of_average = raw.get(criterion.metric), averaged.get(criterion.metric)
        assert not isinstance(value, list)
        assert not isinstance(of_average, list)
        if value is None or of_average is None or not criterion.is_better(value, of_average):
            self._average_is_behind = False
        return raw
