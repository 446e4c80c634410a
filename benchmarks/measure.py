"""The common parts of the benchmarks: timing in turn, counts of arithmetic, peak memory, and the output of results."""

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
"""Width of the tables in characters, the same for a terminal and for a log file."""

_MARK = "measured"


@dataclass
class Contender:
    """A piece of work and its measurements."""

    name: str
    work: Callable[[], object]
    flops: int = 0  # operations of matrix products and convolutions
    memory: int = 0  # peak in bytes, on top of the memory in use before
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median time of the runs, seconds."""
        return statistics.median(self.seconds)


class Arithmetic(TorchDispatchMode):
    """Count the operations of matrix products and convolutions inside a `with` block, forward and backward.

    The formulas are those of PyTorch. Its FlopCounterMode is not used, because its hooks allow no gradient at a leaf.
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
    ) -> Any:  # noqa: ANN401 - the result of any operation
        """Run an operation and count its arithmetic."""
        formula = flop_registry.get(operation.overloadpacket)
        if formula is None:
            with self:  # in inference mode, composite operations arrive undecomposed
                parts = operation.decompose(*args, **(kwargs or {}))
            return operation(*args, **(kwargs or {})) if parts is NotImplemented else parts
        result = operation(*args, **(kwargs or {}))
        self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def race(contenders: Sequence[Contender], device: torch.device, repeats: int) -> None:
    """Measure the arithmetic and memory of each contender, which also warms it up, then time them in turn."""
    for contender in contenders:
        # Eager: the operations of a compiled module cannot be counted, and a module that once ran under a dispatch mode
        # is never compiled again.
        with torch.compiler.set_stance("force_eager"), Arithmetic() as arithmetic:
            contender.work()
        contender.flops = arithmetic.flops
        first = devices.seconds(contender.work, device)  # compiled, if the work is to be compiled
        if device.type == "cuda":
            print(f"{contender.name}: first run, including compilation, {first:.1f} s", flush=True)
        contender.memory = peak_memory(contender.work, device)
    for _ in range(repeats):
        for contender in contenders:
            contender.seconds.append(devices.seconds(contender.work, device))


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of a piece of work in bytes, on top of the memory in use before.

    On CUDA this is the memory of the caching allocator. On the CPU it is the memory of PyTorch's allocator as its
    profiler records it, which includes the temporaries of operators but not the scratch memory of oneDNN.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()  # the first run frees memory that was allocated before the recording
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
    """Return the measurements of a contender that every benchmark records.

    Args:
        contender: Contender that has been measured by `race`.
        peer: Contender that it is compared with; None leaves the ratio out.
        rate: Operations per second of one large matrix product.
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
    """Disable TF32 for convolutions on CUDA inside the `with` block."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def missing(packages: Sequence[str]) -> str | None:
    """Return why a peer that needs these packages cannot run, or None if all of them are installed."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"no package {absent[0]}" if absent else None


# --- the command line and the result ---------------------------------------------------------------------------------


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """Return an argument parser with the options that all benchmarks share."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", help="cpu or cuda [default: cuda where there is one]")
    options.add_argument("--repeats", type=int, default=repeats, help="timed runs of each contender")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    return options


def save(figures: Mapping[str, Any], out: Path, name: str, device: torch.device) -> None:
    """Write the results to the file that `benchmarks.summary` reads."""
    atomic_write(out / f"{name}-{device.type}.json", (json.dumps(figures, indent=2) + "\n").encode())


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the names, times, ratios, floors and memory of the rows as a table."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for heading in ("s", "peer / this", "floor, s", "of the floor", "GiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(f"{row['name']} {row.get('precision', '')}", *cells(row))
    Console(width=WIDTH).print(table)
    print(
        "floor: the arithmetic at the rate of one large matrix product; GiB: peak memory on top of that in use before"
    )


def cells(row: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """Return time, ratio, floor, floor over time and memory as text; a dash stands for a missing value."""
    ratio, floor, memory = (row.get(key) for key in ("peer_over_this", "floor_seconds", "memory_bytes"))
    return (
        f"{row['seconds']:.3g}",
        "-" if ratio is None else f"{ratio:.2f}",
        "-" if floor is None else f"{floor:.3g}",
        "-" if floor is None else f"{floor / row['seconds']:.0%}",
        "-" if memory is None else f"{memory / 2**30:.3g}",
    )


def growth_cells(curve: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return a growth curve as text: the work, the powers of time and memory, and the dominant operator."""
    time, memory = (f"{curve['size']}^{curve[key]:.2f}" for key in ("exponent", "memory_exponent"))
    return curve["what"], time, memory, f"{curve['dominant'][:60]} ({curve['dominant_share']:.0%})"
