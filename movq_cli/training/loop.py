"""What the training of both stages shares: steps, averages, logging, validation, checkpoints, resuming, stopping."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from movq_cli import checkpoints, devices, signals
from movq_cli.console import Console
from movq_cli.errors import BadRequestError, FailureError, InterruptedRunError
from movq_cli.files import atomic_write
from movq_cli.ranks import Ranks
from movq_cli.runs import Manifest, Run, now
from movq_cli.settings import TrainSettings
from movq_cli.training.log import Figures, Log, Metrics, Speed

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

    @property
    def device(self) -> torch.device:
        """Where the models are."""

    @property
    def ranks(self) -> Ranks:
        """Which part of each batch is this process's."""

    @property
    def guard(self) -> Guard:
        """Asked at each step whether the models may move."""

    def batches(self, start: int) -> Iterator[Any]:
        """This rank's shares of the batches from a step on, without end."""

    def batch_names(self, step: int) -> list[str]:
        """The images of a step's whole batch."""

    def step(self, batch: Any, step: int) -> Metrics:  # noqa: ANN401 - each stage has its own batch
        """Update the models; the metrics are scalars that stay on the device."""

    def validate(self) -> Figures:
        """Figures on the validation split, with the weights that would be exported; the same on every rank."""

    def score(self, figures: Figures) -> float:
        """How good a validation was, higher is better: the best one's weights are kept."""

    def parts(self) -> Mapping[str, Stateful]:
        """Everything that the next step depends on: models, optimisers, averages, counts."""

    def export(self, path: Path) -> None:
        """Write the inference weights."""

    def draw(self, run: Run, step: int) -> None:
        """Make the run's picture of this step."""


def train(
    stage: Stage, run: Run, manifest: Manifest, console: Console, *, tflop_per_step: float | None = None
) -> Figures:
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
    figures: Figures = {}
    speed = None if tflop_per_step is None else Speed.measured(tflop_per_step, stage.device, settings.precision)
    stop = threading.Event()
    batches = stage.batches(step)
    if step == steps:
        # Killed between its last checkpoint and its end.
        figures = stage.validate()
        keeper.publish(step)
    with (
        Log(run, console, settings, ranks, manifest.steps, speed) as log,
        signals.heard(stop.set, launched=ranks.world > 1),
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
            stopping = ranks.any(stop.is_set() or ranks.orphaned)
            last = step == steps
            validate = last or step % settings.validate_every == 0
            save = last or step % settings.checkpoint_every == 0 or stopping
            if validate or save or step % settings.log_every == 0:
                _check(stage, keeper)
                log.flush(step)
            progress.advance(1, log.shown)
            if validate:
                figures = stage.validate()
                log.validation(step, figures)
                keeper.keep_best(step, stage.score(figures))
                if ranks.first:
                    stage.draw(run, step)
            if save:
                keeper.save(step)
            if validate or save:
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


def learning_rate(settings: TrainSettings, steps: int, step: int) -> float:
    """The rate of a step: a linear warm-up, then constant or a cosine to 0 at the last step.

    A function of the step alone: there is no schedule whose place could be lost.

    Args:
        settings: Rate, warm-up steps and decay.
        steps: Of the whole run.
        step: From 0.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.decay == "none":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def check_shares(settings: TrainSettings, ranks: Ranks) -> None:
    """Refuse a batch that does not divide into equal parts for all ranks.

    Raises:
        BadRequestError: With what would divide it.
    """
    parts = ranks.world * settings.accumulate
    if settings.batch_size % parts:
        raise BadRequestError(
            f"batch_size {settings.batch_size} does not divide into {ranks.world} ranks x {settings.accumulate} parts",
            f"Set it to {math.ceil(settings.batch_size / parts) * parts}, or another number of GPUs or of accumulate.",
        )


def recompute(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Have blocks of these kinds keep no activations for the backward pass, which computes them again."""
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


class Trainable(Generic[ModelT]):
    """A model being trained, with all that an update of it needs.

    Args:
        model: On its device.
        optimizer: Of its parameters; a fused one, which can leave them as they are without the host knowing.
        settings: Rates, clipping, averaging and compilation.
        steps: Of the whole run.
        ranks: Whose gradients are averaged.
        average: Whether the settings' running average is kept of it.
    """

    def __init__(
        self,
        model: ModelT,
        optimizer: Optimizer,
        settings: TrainSettings,
        steps: int,
        ranks: Ranks,
        *,
        average: bool = True,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.steps = steps
        device = next(model.parameters()).device
        self.average: AveragedModel | None = None
        if average and settings.ema_decay > 0:
            self.average = AveragedModel(model)
        if devices.on_cuda_unless(settings.compile, device):
            model.compile()
        self.forward = ranks.wrap(model)
        """What a training step calls: the model, with gradients that are means over the ranks."""

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward_of(self, part: int) -> AbstractContextManager[object]:
        """Around forward and backward of one part of a batch: ranks exchange gradients only after the last."""
        if isinstance(self.forward, DistributedDataParallel) and part < self.settings.accumulate - 1:
            return self.forward.no_sync()
        return nullcontext()

    def clip(self) -> Tensor:
        """The norm of all gradients, scaled down to the settings' where that is smaller; the norm is the one before."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if self.settings.clip_norm is not None:
            clip_grads_with_norm_(self.model.parameters(), self.settings.clip_norm, norm)
        return norm

    def update(self, step: int, good: Tensor) -> None:
        """One step of the optimiser and of the average along the gradients.

        Args:
            step: Whose learning rate it is.
            good: Scalar, 1 or 0; 0 = everything stays as it is.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.steps, step)
        # GradScaler's way of having a fused optimiser skip a step, without the host waiting for the answer.
        self.optimizer.found_inf = 1 - good  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.average is not None:
            self._blend(self.average, good)

    @torch.no_grad()
    def _blend(self, average: AveragedModel, good: Tensor) -> None:
        """An exponential moving average, which rests where the weights do.

        Not AveragedModel's own update, which copies its count to the device at each step, and has the host wait for it.
        """
        first = average.n_averaged == 0  # on the CPU
        share = (1.0 if first else 1 - self.settings.ema_decay) * good
        averages: list[Tensor] = list(average.module.parameters())
        weights: list[Tensor] = list(self.model.parameters())
        torch._foreach_mul_(averages, 1 - share)
        torch._foreach_add_(averages, list(torch._foreach_mul(weights, share)))
        average.n_averaged += 1

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
        parts: dict[str, Stateful] = {"model": self.model, "optimizer": self.optimizer}
        return parts if self.average is None else {**parts, "average": self.average}


class Guard:
    """Keeps models from moving along gradients that are not finite, from the first such step on.

    The verdict stays on the device, so that the host need not wait for it at each step: until it looks, nothing moves.

    Args:
        device: Of the models.
        ranks: All of which must be well.
    """

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.ranks = ranks
        self._bad = torch.full((), -1, device=device)
        self._kept: dict[tuple[str, ...], Tensor] = {}

    def good(self, step: int, metrics: Metrics) -> Tensor:
        """1 where every metric of this step and of all steps before is finite on every rank, else 0; float32."""
        names, values = tuple(metrics), torch.stack([value.detach() for value in metrics.values()])
        faults = self.ranks.sum((~values.isfinite()).sum())
        newly = (self._bad < 0) & (faults > 0)
        self._kept[names] = torch.where(newly, values, self._kept.get(names, torch.zeros_like(values)))
        self._bad = torch.where(newly, step, self._bad)
        return (self._bad < 0).float()

    def verdict(self) -> tuple[int, dict[str, float]] | None:
        """The first bad step and this rank's metrics of it; None while all is well. The host waits for the device."""
        bad = int(self._bad.item())
        if bad < 0:
            return None
        # Which metrics a step has changes when the discriminator sets in: the others' were never kept.
        names, values = next((names, kept) for names, kept in self._kept.items() if kept.any())
        return bad, dict(zip(names, values.tolist(), strict=True))


def _check(stage: Stage, keeper: _Keeper) -> None:
    """End the run where a step was not finite; the models have not moved since."""
    verdict = stage.guard.verdict()
    if verdict is None:
        return
    done, values = verdict
    names = stage.batch_names(done)
    report = keeper.run.folder / "nonfinite.json"
    if stage.ranks.first:
        record = {"step": done + 1, "metrics": {name: str(value) for name, value in values.items()}, "batch": names}
        atomic_write(report, json.dumps(record, indent=1).encode())
    kept = (
        f"the state before it is the checkpoint in {keeper.run.folder}"
        if keeper.save_if_finite(done)
        else ("the weights were not finite before it either, so the last checkpoint stays")
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

    def __init__(self, stage: Stage, run: Run, manifest: Manifest) -> None:
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
        if self.stage.ranks.first:
            self.stage.export(self.run.best)

    def save(self, step: int) -> None:
        """Write everything that the next step depends on, and the weights."""
        if not self.stage.ranks.first:
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
        if not self.stage.ranks.first:
            return
        self.stage.export(self.run.weights)
        finished = step >= self.manifest.steps
        status = "finished" if finished else "running"
        update = {"step": step, "status": status, "finished": now() if finished else None}
        self.run.write(self.manifest.model_copy(update=update))
