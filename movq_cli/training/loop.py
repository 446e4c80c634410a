"""What the training of both stages shares: steps, averages, logging, validation, checkpoints, resuming, stopping."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from movq_cli import checkpoints
from movq_cli.console import Console
from movq_cli.errors import FailureError, InterruptedRunError
from movq_cli.runs import Manifest, Run, now
from movq_cli.settings import TrainSettings

Metrics = dict[str, Tensor]
ModelT = TypeVar("ModelT", bound=nn.Module)


class Stateful(Protocol):
    """What a checkpoint can hold: every module, optimiser and schedule of torch's."""

    def state_dict(self) -> dict[str, Any]:
        """Its state as tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Take a state over."""


class Stage(Protocol):
    """One stage's training: its models and what one step does. The loop owns the rest."""

    @property
    def settings(self) -> TrainSettings:
        """Rates, intervals and the seed."""

    def batches(self, start: int) -> Iterator[Any]:
        """Batches from a step on, without end."""

    def step(self, batch: Any, step: int) -> Metrics:  # noqa: ANN401 - each stage has its own batch
        """Update the models; the metrics are scalars that stay on the device."""

    def validate(self) -> dict[str, float]:
        """Figures on the validation split, with the weights that would be exported."""

    def parts(self) -> Mapping[str, Stateful]:
        """Everything that the next step depends on: models, optimisers, averages, counts."""

    def export(self, run: Run) -> None:
        """Write the inference weights."""

    def draw(self, run: Run, step: int) -> None:
        """Make the run's picture of this step."""


def train(stage: Stage, run: Run, manifest: Manifest, console: Console) -> dict[str, float]:
    """Train a stage to its last step, from its last checkpoint if there is one.

    Args:
        stage: What is trained.
        run: Where everything is written.
        manifest: As `runs.begin` gave it.
        console: For progress and log lines.

    Returns:
        The last validation's figures.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM; a checkpoint was written first.
        FailureError: A loss is no longer finite, or a file cannot be written.
    """
    settings, steps = stage.settings, manifest.steps
    step = _resume(stage, run, console)
    log = _Log(run, console, settings)
    figures: dict[str, float] = {}
    batches = stage.batches(step)
    if step == steps:
        # Killed between its last checkpoint and its end.
        figures = stage.validate()
        _publish(stage, run, manifest, step)
    with _stop_signals() as stop, console.progress(steps, "training", "steps", done=step) as progress:
        while step < steps:
            # Each step draws from a generator state of its own: a resumed run draws what it would have.
            torch.manual_seed(step_seed(settings.seed, step))
            metrics = stage.step(next(batches), step)
            step += 1
            log.add(step, metrics)
            progress.advance(1, log.note)
            last = step == steps
            validate = last or step % settings.validate_every == 0
            save = last or step % settings.checkpoint_every == 0 or stop.signal is not None
            if validate or save:
                log.flush(step)  # raises, so that no checkpoint of finite weights gives way to one that is not
            if validate:
                figures = stage.validate()
                log.write(step, {"validation": figures})
                stage.draw(run, step)
            if save:
                _save(stage, run, manifest, step)
            if stop.signal is not None and not last:
                raise InterruptedRunError(
                    f"stopped at step {step} of {steps}; a checkpoint is in {run.folder}",
                    "The same command goes on from there.",
                )
    return figures


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's draws, mixed from both: torch's CPU generator reads only 32 bits of what it is given."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def learning_rate_schedule(optimizer: Optimizer, settings: TrainSettings, steps: int) -> LambdaLR:
    """Linear warm-up, then constant or a cosine to 0 at the last step.

    Args:
        optimizer: Whose base rate is scaled.
        settings: Warm-up steps and decay.
        steps: Of the whole run.
    """

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        if settings.decay == "none":
            return 1.0
        progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)


class Trainable(Generic[ModelT]):
    """A model being trained, with all that an update of it needs.

    Args:
        model: On its device.
        optimizer: Of its parameters.
        settings: Rate schedule, clipping and averaging.
        steps: Of the whole run.
        average: Whether the settings' running average is kept of it.
    """

    def __init__(
        self, model: ModelT, optimizer: Optimizer, settings: TrainSettings, steps: int, *, average: bool = True
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = learning_rate_schedule(optimizer, settings, steps)
        self.clip_norm = settings.clip_norm
        self.average: AveragedModel | None = None
        if average and settings.ema_decay > 0:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True)

    def update(self, backward: Callable[[], None]) -> None:
        """One step of the optimiser, the schedule and the average along the gradients that `backward` leaves."""
        self.optimizer.zero_grad(set_to_none=True)
        backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    @property
    def exported(self) -> ModelT:
        """The weights that are validated and exported, in eval mode: the average's where there is one."""
        if self.average is None:
            return self.model.eval()
        assert isinstance(self.average.module, type(self.model))
        return self.average.module.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take over what `state_dict` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state_dict[name])

    def _parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }
        return parts if self.average is None else {**parts, "average": self.average}


@dataclass
class _Stop:
    signal: int | None = None


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn the first Ctrl-C or SIGTERM into a wish that the loop grants; a second one ends the process as ever."""
    stop = _Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.signal = number
        for known, handler in before.items():
            signal.signal(known, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _resume(stage: Stage, run: Run, console: Console) -> int:
    """Load the last checkpoint, if there is one; the steps already made."""
    if not run.checkpoint.exists():
        return 0
    state = checkpoints.load_state(run.checkpoint, torch.device("cpu"))
    for name, part in stage.parts().items():
        part.load_state_dict(state["stage"][name])
    step = int(state["step"])
    console.log(f"going on from step {step} in {run.folder}")
    return step


def _save(stage: Stage, run: Run, manifest: Manifest, step: int) -> None:
    state = {name: part.state_dict() for name, part in stage.parts().items()}
    checkpoints.save_state(run.checkpoint, {"step": step, "stage": state})
    _publish(stage, run, manifest, step)


def _publish(stage: Stage, run: Run, manifest: Manifest, step: int) -> None:
    """The inference weights, and how far the run is."""
    stage.export(run)
    finished = step >= manifest.steps
    status = "finished" if finished else "running"
    run.write(manifest.model_copy(update={"step": step, "status": status, "finished": now() if finished else None}))


class _Log:
    """Means of the metrics between log lines, as JSON lines in the run folder and a note beside the progress."""

    def __init__(self, run: Run, console: Console, settings: TrainSettings) -> None:
        self.run = run
        self.console = console
        self.every = settings.log_every
        self.batch_size = settings.batch_size
        self.note = ""
        self._sums: Metrics = {}
        self._count = 0
        self._since = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1
        if step % self.every == 0:
            self.flush(step)

    def write(self, step: int, record: dict[str, Any]) -> None:
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with self.run.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": now(), **record}) + "\n")
        if "validation" in record:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in record["validation"].items())
            self.console.log(f"step {step}: {figures}")

    def flush(self, step: int) -> None:
        if not self._count:
            return
        # The one place where the host waits for the device.
        means = {name: value.item() / self._count for name, value in self._sums.items()}
        seconds = time.perf_counter() - self._since
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise FailureError(
                f"{bad[0]} is {means[bad[0]]} in the {self._count} steps before step {step}",
                f"The last good checkpoint is in {self.run.folder}; try a lower learning rate or precision=float32.",
            )
        self.write(step, {"training": means, "images_per_second": self._count * self.batch_size / seconds})
        self.note = f"loss {means['loss']:.4f}"
        self._sums, self._count, self._since = {}, 0, time.perf_counter()
