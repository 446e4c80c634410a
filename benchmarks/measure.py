"""How the benchmarks measure: in turn, in the same run, with arithmetic and peak memory beside the time."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from movq_cli import devices
from movq_cli.files import atomic_write

RESULTS = Path("benchmarks/results")

WIDTH = 140
"""Of the tables: a log is read as well as a terminal."""

_MARK = "measured"


@dataclass
class Contender:
    """A piece of work, and what is measured of it."""

    name: str
    work: Callable[[], object]
    flops: int = 0  # of the matrix products and convolutions
    memory: int = 0  # bytes that it holds at most, on top of what is held before
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of the runs' median."""
        return statistics.median(self.seconds)


class Arithmetic(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions, forward and backward, while it is entered.

    By PyTorch's own formulas, but not by its FlopCounterMode, whose hooks allow no gradient at a leaf.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self,
        operation: torch._ops.OpOverload[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operation gives
        """Run an operation and count it."""
        formula = flop_registry.get(operation.overloadpacket)
        if formula is None:
            with self:  # in inference mode those made of others arrive whole
                parts = operation.decompose(*args, **(kwargs or {}))
            return operation(*args, **(kwargs or {})) if parts is NotImplemented else parts
        result = operation(*args, **(kwargs or {}))
        self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def race(contenders: Sequence[Contender], device: torch.device, repeats: int) -> None:
    """Measure each contender's arithmetic and memory, which warms it up; then time them in turn."""
    for contender in contenders:
        # Uncompiled: in a compiled module no operation is seen, and one that meets a mode is never compiled again.
        with torch.compiler.set_stance("force_eager"), Arithmetic() as arithmetic:
            contender.work()
        contender.flops = arithmetic.flops
        contender.work()  # compiled, where it is to be
        contender.memory = peak_memory(contender.work, device)
    for _ in range(repeats):
        for contender in contenders:
            contender.seconds.append(devices.seconds(contender.work, device))


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that a piece of work holds at most on top of what is held before.

    CUDA: of the caching allocator. CPU: of PyTorch's allocator as its profiler records it, temporaries of operators
    included, the scratch memory of oneDNN not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()  # memory from before the recording is freed unseen
        with record_function(_MARK):
            work()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == _MARK)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    levels = list(accumulate((size for _, size in changes), initial=0))
    before = sum(when < start for when, _ in changes)
    return max(levels[before:]) - levels[before]


def figures(contender: Contender, peer: Contender | None, rate: float) -> dict[str, Any]:
    """What every benchmark tells of a contender.

    Args:
        contender: After its race.
        peer: Whom it ran against.
        rate: Operations a second of one large matrix product.
    """
    return {
        "seconds": contender.median,
        "runs": contender.seconds,
        "peer_over_this": None if peer is None else peer.median / contender.median,
        "flops": contender.flops,
        "matrix_flops_per_second": rate,
        "floor_seconds": contender.flops / rate,
        "memory_bytes": contender.memory,
    }


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions in it are of full float32 on CUDA too, not TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def missing(packages: Sequence[str]) -> str | None:
    """The reason why a peer that needs these packages cannot run here; None where it can."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"no package {absent[0]}" if absent else None


# --- the command line and the result ---------------------------------------------------------------------------------


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """A benchmark's options, those that all have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", help="CUDA where there is one, if not given")
    options.add_argument("--repeats", type=int, default=repeats, help="timed runs of each contender")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    return options


def save(figures: Mapping[str, Any], out: Path, name: str, device: torch.device) -> None:
    """Write a report where `benchmarks.summary` finds it."""
    atomic_write(out / f"{name}-{device.type}.json", (json.dumps(figures, indent=2) + "\n").encode())


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows' names, seconds, ratios, floors and memory as a table."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for heading in ("s", "peer / this", "floor, s", "of the floor", "GiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(f"{row['name']} {row.get('precision', '')}", *cells(row))
    Console(width=WIDTH).print(table)
    print("floor: the arithmetic at the rate of one large matrix product; GiB: held at most on top of what was before")


def cells(row: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """Seconds, ratio, floor, share of the floor and memory as text, a dash for what a row has not."""
    ratio, floor, memory = (row.get(key) for key in ("peer_over_this", "floor_seconds", "memory_bytes"))
    return (
        f"{row['seconds']:.3g}",
        "-" if ratio is None else f"{ratio:.2f}",
        "-" if floor is None else f"{floor:.3g}",
        "-" if floor is None else f"{floor / row['seconds']:.0%}",
        "-" if memory is None else f"{memory / 2**30:.3g}",
    )


def growth_cells(curve: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A curve of growth as text: what, the powers of time and memory, and what dominates."""
    time, memory = (f"{curve['size']}^{curve[key]:.2f}" for key in ("exponent", "memory_exponent"))
    return curve["what"], time, memory, f"{curve['dominant'][:60]} ({curve['dominant_share']:.0%})"
