"""A model in training: its optimiser, rate and average, and what keeps it from moving along bad gradients."""

from __future__ import annotations

import math
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

from movq_cli import devices
from movq_cli.errors import BadRequestError
from movq_cli.ranks import Ranks
from movq_cli.settings import TrainSettings
from movq_cli.training.log import DeviceMetrics

ModelT = TypeVar("ModelT", bound=nn.Module)


class Stateful(Protocol):
    """What a checkpoint can hold: every module, optimiser and schedule of torch's."""

    def state_dict(self) -> dict[str, Any]:
        """Its state as tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Take a state over."""


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
    parts = ranks.world_size * settings.accumulate
    if settings.batch_size % parts:
        raise BadRequestError(
            f"batch_size {settings.batch_size} does not divide into {ranks.world_size} ranks x {settings.accumulate} parts",
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
        if devices.enabled_on_cuda(settings.compile, device):
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

    def good(self, step: int, metrics: DeviceMetrics) -> Tensor:
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
