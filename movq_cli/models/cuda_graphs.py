"""CUDA graphs of decoding steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

SharedT = TypeVar("SharedT")


class GraphRecorder:
    """Run the steps of a decoding; on CUDA, each kind of step is recorded once as a graph and replayed afterwards.

    A step of one token consists of hundreds of small kernels, which the host launches more slowly than the device runs
    them. A graph launches the same kernels with one call. A graph stores memory addresses: a step has to read and write
    the same tensors each time, and everything that changes from step to step has to be in these tensors. `reuse` gives
    the next decoding the same tensors again, so that its steps are recorded already.
    """

    def __init__(self) -> None:
        self._shared: tuple[object, Any] | None = None  # the key, and the object that `make` returned for it
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None  # the memory pool of all graphs; None on other devices than CUDA

    def __reduce__(self) -> tuple[type[GraphRecorder], tuple[()]]:
        """Copy and pickle as an empty recorder: the tensors of a copied model have other addresses."""
        return GraphRecorder, ()

    def reuse(self, key: object, weights: Iterable[Tensor], make: Callable[[], SharedT]) -> SharedT:
        """Return the object that the steps of a decoding share, in the state in which the last decoding left it.

        If the last decoding had another key, or the weights have moved in memory, the shared object and all graphs are
        deleted and the object is made anew.

        Args:
            key: Value that is equal for decodings whose steps do the same work on tensors of the same shapes and types.
            weights: Tensors that the steps read besides, all on one device.
            make: Function that makes the shared object.
        """
        tensors = list(weights)
        key = (key, [tensor.data_ptr() for tensor in tensors])
        if self._shared is None or self._shared[0] != key:
            self._shared, self._graphs = None, {}  # Free the old memory before as much is allocated again.
            self._pool = torch.cuda.graph_pool_handle() if tensors[0].device.type == "cuda" else None
            self._shared = key, make()
        shared: SharedT = self._shared[1]
        return shared

    def run(self, kind: Hashable, step: Callable[[], object]) -> None:
        """Run a step.

        Args:
            kind: Kind of the step; all steps of one kind do the same work on the same tensors.
            step: Function that runs the step; its result is not used.
        """
        if self._pool is None or kind not in self._graphs:
            step()  # Libraries initialize themselves in the first step of a kind, which cannot be recorded.
            self._graphs[kind] = None
            return
        graph = self._graphs[kind]
        if graph is None:
            graph = self._graphs[kind] = torch.cuda.CUDAGraph()
            # Other threads, such as those of data loaders and of NCCL, may use the device during the recording.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
        graph.replay()
