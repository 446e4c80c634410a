"""Decoding steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

KeptT = TypeVar("KeptT")


class Recorder:
    """Runs the steps of a decoding; on CUDA each kind is recorded once as a graph, and replayed from then on.

    A step of one token is hundreds of small kernels, which the host launches more slowly than the device runs them. A
    graph is one launch, of the very same kernels. It knows addresses, not names: a step has to find all that it reads
    and writes in the same tensors each time, and all that differs from step to step in them too. So has the next
    decoding, which then finds its steps recorded: see `keep`.
    """

    def __init__(self) -> None:
        self._shared: tuple[object, Any] | None = None  # by which key, and what it is
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None  # of the graphs' memory; None = not on CUDA

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        """A copy of a model has other addresses: it starts with nothing recorded."""
        return Recorder, ()

    def keep(self, key: object, read: Iterable[Tensor], make: Callable[[], KeptT]) -> KeptT:
        """What the steps of a decoding share, in the state in which the last one of the same key left it.

        Where the last was of another key, or what it read has moved, all that was kept and recorded is forgotten.

        Args:
            key: Equal for decodings whose steps do the same, on tensors of the same shapes and types.
            read: Tensors that steps read besides, such as weights, all on one device.
            make: Makes what is shared.
        """
        weights = list(read)
        key = (key, [weight.data_ptr() for weight in weights])
        if self._shared is None or self._shared[0] != key:
            self._shared, self._graphs = None, {}  # before as much is made again
            self._pool = torch.cuda.graph_pool_handle() if weights[0].device.type == "cuda" else None
            self._shared = key, make()
        kept: KeptT = self._shared[1]
        return kept

    def run(self, kind: Hashable, step: Callable[[], object]) -> None:
        """Run a step.

        Args:
            kind: Steps of one kind do the same to the same tensors.
            step: Returns nothing that is needed.
        """
        if self._pool is None or kind not in self._graphs:
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
