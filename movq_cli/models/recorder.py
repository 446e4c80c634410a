"""Decoding steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Recorder:
    """Runs the steps of a decoding; on CUDA each kind is recorded once as a graph, and replayed from then on.

    A step of one token is hundreds of small kernels, which the host launches more slowly than the device runs them. A
    graph is one launch, of the very same kernels. It knows addresses, not names: a step has to find all that it reads
    and writes in the same tensors each time, and all that differs from step to step in them too.

    Args:
        device: Where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._records = device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._records else None

    def run(self, kind: Hashable, step: Callable[[], object]) -> None:
        """Run a step.

        Args:
            kind: Steps of one kind do the same to the same tensors.
            step: Returns nothing that is needed.
        """
        if not self._records or kind not in self._graphs:
            step()  # the first of a kind is run as it is: libraries set themselves up, which cannot be recorded
            self._graphs[kind] = None
            return
        graph = self._graphs[kind]
        if graph is None:
            graph = self._graphs[kind] = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: loaders do, and NCCL's.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
        graph.replay()
