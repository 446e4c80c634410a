"""A model in training with its optimizer, learning rate and running average, and the check for non-finite steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from movq_cli.errors import BadRequestError
from movq_cli.ranks import Ranks
from movq_cli.training.log import DeviceMetrics
from movq_cli.training_settings import TrainSettings

COMPILED_FROM = 2_000
"""Number of steps from which a training on CUDA is compiled, unless the settings say otherwise.

On an H200, compiling the step of preset ffhq took 124 s, and took 0.08 s off each step of 16 images
(docs/measured.md): it pays from 1,500 steps on.
"""

ModelT = TypeVar("ModelT", bound=nn.Module)


class Stateful(Protocol):
    """An object whose state a checkpoint can store, such as a module or an optimizer of PyTorch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Replace the state by what `state_dict` returned."""


def schedule(settings: TrainSettings, steps: int, step: int) -> float:
    """Return the factor on the learning rate at a step: a linear warm-up, then 1 or a cosine to 0 at the last step.

    The factor depends on the step alone, so that no state of a schedule has to be stored.

    Args:
        settings: Warm-up steps and decay.
        steps: Number of steps of the complete run.
        step: Index of the step, from 0.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.decay == "none":
        return 1.0
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def average_decay(settings: TrainSettings, updates: int) -> float:
    """Return the decay of the running average at an update: min(ema_decay, (1 + n) / (10 + n)).

    Without this warm-up (TensorFlow's), the weights of the first steps would dominate the average of a short run.

    Args:
        settings: Decay after the warm-up.
        updates: Number of updates before this one, n.
    """
    return min(settings.ema_decay, (1 + updates) / (10 + updates))


def check_shares(settings: TrainSettings, ranks: Ranks) -> None:
    """Check that a batch divides into `accumulate` equal parts on every rank.

    Raises:
        BadRequestError: It does not; the hint names the next batch size that does.
    """
    parts = ranks.world_size * settings.accumulate
    if settings.batch_size % parts:
        raise BadRequestError(
            f"batch_size {settings.batch_size} does not divide into {ranks.world_size} ranks x "
            f"{settings.accumulate} parts",
            f"Set it to {math.ceil(settings.batch_size / parts) * parts}, or another number of GPUs or of accumulate.",
        )


def checkpoint_activations(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Apply activation checkpointing to all blocks of these types.

    Their activations are not stored for the backward pass, which computes them again.
    """
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


class Trainable(Generic[ModelT]):
    """A model in training with its optimizer and the running average of its weights.

    Args:
        model: Model, on its device.
        optimizer: Optimizer of the model's parameters. It has to be a fused one, which can skip a step on the device
            without the host waiting for the decision. A group of parameters with an entry `constant_rate` has this
            learning rate at each step.
        settings: Schedule of the learning rate, clipping, averaging and compilation.
        steps: Number of steps of the complete run.
        ranks: Processes over which gradients are averaged.
        average: Whether there is a running average, if the settings have one (ema_decay > 0).
        learning_rate: Learning rate before the schedule's factor; None uses that of the settings.
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
        learning_rate: float | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.ranks = ranks
        self.learning_rate = learning_rate or settings.learning_rate
        self.steps = steps
        device = next(model.parameters()).device
        self.average: AveragedModel | None = None
        self._averaged: tuple[list[Tensor], list[Tensor]] = [], []
        """The averages, and the weights that they follow.

        A frozen weight is not among them: it equals its average, which rounding would change.
        """
        if average and settings.ema_decay > 0:
            self.average = AveragedModel(model)
            for own, weight in zip(self.average.module.parameters(), model.parameters(), strict=True):
                if weight.requires_grad:
                    self._averaged[0].append(own)
                    self._averaged[1].append(weight)
        if is_compiled(settings, steps, device):
            # The products that stay in float32 stay there on purpose.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            model.compile()
        self.forward = ranks.wrap(model)
        """The function that a training step calls: the model, whose gradients become means over the ranks."""

    def set_weights(self, model: ModelT) -> None:
        """Replace the weights, and their running average, by those of a model of the same architecture."""
        self.model.load_state_dict(model.state_dict())
        if self.average is not None:
            self.average.module.load_state_dict(model.state_dict())

    def clear(self) -> None:
        """Delete the gradients of the previous step."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward_of(self, part: int) -> AbstractContextManager[object]:
        """Return the context for the forward and the backward pass of one part of a batch.

        Ranks exchange gradients in the backward pass of the last part only.
        """
        if isinstance(self.forward, DistributedDataParallel) and part < self.settings.accumulate - 1:
            return self.forward.no_sync()
        return nullcontext()

    def clip(self) -> Tensor:
        """Clip the norm of all gradients to the settings' clip_norm and return the norm before clipping."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if self.settings.clip_norm is not None:
            clip_grads_with_norm_(self.model.parameters(), self.settings.clip_norm, norm)
        return norm

    def update(self, step: int, is_finite: Tensor) -> None:
        """Make one step of the optimizer and of the running average.

        Args:
            step: Index of the step, from 0, which decides the learning rate.
            is_finite: Scalar float32; with 1 the step is made, with 0 weights and average stay as they are.
        """
        for group in self.optimizer.param_groups:
            scheduled = self.learning_rate * schedule(self.settings, self.steps, step)
            group["lr"] = group.get("constant_rate", scheduled)
        # GradScaler makes a fused optimizer skip a step in the same way: the host does not wait for the value.
        self.optimizer.found_inf = 1 - is_finite  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.average is not None:
            self._update_average(self.average, is_finite)

    @torch.no_grad()
    def _update_average(self, average: AveragedModel, is_finite: Tensor) -> None:
        """Update the exponential moving average, unless the step is skipped.

        AveragedModel.update_parameters is not used: it copies its step count to the device at each step, for which the
        host waits.
        """
        # The number of updates is a tensor on the CPU.
        share = (1 - average_decay(self.settings, int(average.n_averaged))) * is_finite
        averages, weights = self._averaged
        torch._foreach_mul_(averages, 1 - share)
        torch._foreach_add_(averages, list(torch._foreach_mul(weights, share)))
        average.n_averaged += 1

    @torch.no_grad()
    def reset_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Restart the optimizer's state and the running average of rows whose weights have been replaced.

        The moments of these rows become 0, and their averages become the new weights.

        Args:
            rows: For each parameter, by its name in the model, the replaced rows, bool of the length of its first
                dimension.
        """
        for name, replaced in rows.items():
            weight = self.model.get_parameter(name)
            mask = replaced.view(-1, *[1] * (weight.ndim - 1))
            for moment in self.optimizer.state[weight].values():
                if isinstance(moment, Tensor) and moment.shape == weight.shape:
                    moment.masked_fill_(mask, 0.0)
            if self.average is not None:
                average = self.average.module.get_parameter(name)
                average.copy_(torch.where(mask, weight, average))

    @property
    def exported(self) -> ModelT:
        """The model to validate and to export, in eval mode: the running average, or without one the model itself."""
        return self.in_eval_mode(averaged=True)

    def in_eval_mode(self, *, averaged: bool) -> ModelT:
        """Return the running average if there is one and it is asked for, else the model itself."""
        if self.average is None or not averaged:
            return self.model.eval()
        assert isinstance(self.average.module, type(self.model))
        return self.average.module.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return the state on which the next update depends."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restore the state that `state_dict` returned; an average that it does not have starts from the weights.

        The options of the optimizer, such as the weight decay, stay those of the settings.
        """
        options = [_without_parameters(group) for group in self.optimizer.param_groups]
        for name, part in self._parts().items():
            if name in state_dict or part is not self.average:
                part.load_state_dict(state_dict[name])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if self.average is not None and "average" not in state_dict:
            self.average.module.load_state_dict(self.model.state_dict())

    def _parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful] = {"model": self.model, "optimizer": self.optimizer}
        return parts if self.average is None else {**parts, "average": self.average}


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


class FiniteCheck:
    """The check that every step is finite; from the first step that is not, no model is updated.

    The result stays on the device, so that the host need not wait for it at each step. It may read the result some
    steps later, since the models have not changed in between.

    Args:
        device: Device of the models.
        ranks: Processes whose metrics are all checked.
    """

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.ranks = ranks
        self._failed_step = torch.full((), -1, device=device)  # -1 while every step was finite
        self._failed_metrics: dict[tuple[str, ...], Tensor] = {}

    def update(self, step: int, metrics: DeviceMetrics) -> Tensor:
        """Check the metrics of a step.

        Returns:
            Scalar float32: 1 if all metrics of this step and of all earlier steps are finite on every rank, else 0.
        """
        names, values = tuple(metrics), torch.stack([value.detach() for value in metrics.values()])
        non_finite = self.ranks.sum((~values.isfinite()).sum())
        fails_now = (self._failed_step < 0) & (non_finite > 0)
        stored = self._failed_metrics.get(names, torch.zeros_like(values))
        self._failed_metrics[names] = torch.where(fails_now, values, stored)
        self._failed_step = torch.where(fails_now, step, self._failed_step)
        return (self._failed_step < 0).float()

    def first_failure(self) -> tuple[int, dict[str, float]] | None:
        """Return the first step that was not finite and this rank's metrics of it; None if there was none.

        The host waits for the device.
        """
        step = int(self._failed_step.item())
        if step < 0:
            return None
        # The names of the metrics change when the discriminator starts. Values were stored for one set of names only.
        names, values = next((names, values) for names, values in self._failed_metrics.items() if values.any())
        return step, dict(zip(names, values.tolist(), strict=True))


def is_compiled(settings: TrainSettings, steps: int | None, device: torch.device) -> bool:
    """Return whether the models of a training are compiled.

    Args:
        settings: Training settings.
        steps: Number of steps of the complete run; None if it depends on a number of images that is not known yet, and
            then it counts as long.
        device: Device of the training.
    """
    if settings.compile is not None:
        return settings.compile
    return device.type == "cuda" and (steps is None or steps >= COMPILED_FROM)
