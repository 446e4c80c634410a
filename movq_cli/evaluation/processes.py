"""The processes of a command that evaluates: how they start, what they share, and how they can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from movq_cli import launcher, signals
from movq_cli.evaluation import extractors
from movq_cli.evaluation.request import EvaluationRequest
from movq_cli.ranks import Ranks


@dataclass(frozen=True)
class Process:
    """One of the processes of a command."""

    ranks: Ranks
    """All processes of the command."""
    device: torch.device
    """Device of this process."""
    barrier: Callable[[], None]
    """Waits for the other processes; rank 0 computes the last metrics alone, which may take long."""


def run_on_ranks(work: Callable[[Process], None], request: EvaluationRequest, arguments: Sequence[str]) -> None:
    """Run a command's work in every process, without gradients and in exact float32.

    Args:
        work: The work of one process.
        request: The device and the number of processes.
        arguments: Arguments of the command line, with which further processes are started.

    Raises:
        BadRequestError: The device is not available, or there are fewer GPUs than processes.
        InterruptedRunError: The process received one of `signals.STOP_SIGNALS`; the features that were computed are
            in the cache.
    """
    if launcher.starts_processes(request.gpus):
        assert request.gpus is not None
        launcher.launch(arguments, request.gpus, request.device)
        return
    with (
        launcher.joined_ranks(request.device) as (all_ranks, device),
        signals.interruptible("the features computed", launched=all_ranks.world_size > 1),
        all_ranks.long_barrier() as barrier,
        extractors.exact_float32(),
    ):
        work(Process(all_ranks, device, barrier))
