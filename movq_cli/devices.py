"""Devices, the precision of their arithmetic, and their speed."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from movq_cli.errors import BadRequestError

_PLAIN_ATTENTION_TOKENS = 64
"""Largest number of tokens for which training on the CPU uses plain matrix products for attention."""

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of mallopt, from glibc's malloc.h."""


class Memory(NamedTuple):
    """Memory of a device, in GiB."""

    total: float
    """All of it; on the CPU at most the limit of this process's control group."""
    available: float
    """Memory that new tensors can take now, in GiB."""


class WithoutInitialization(TorchFunctionMode):
    """Skips the functions of `nn.init`: on the meta device there are no values, and some would import a compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the result of any function of torch
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def select(name: str | None = None) -> torch.device:
    """Return the device with a name such as `cuda`, `cuda:1` or `cpu`; None selects CUDA if it is available.

    If the device is the CPU, this process no longer returns freed memory to the system, but reuses it for new tensors.

    Raises:
        BadRequestError: The device is not available.
    """
    if name is None and torch.cuda.is_available():
        return torch.device("cuda")
    name = "cpu" if name is None else name
    if re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d{1,4})?", name) is None:
        raise BadRequestError(f"there is no device {name!r}", _meant_device(name))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if name.startswith(("mps", "xpu")):  # PyTorch's own text is of its internals.
            reason = f"this machine, or the installed PyTorch, has no {name.partition(':')[0]} device"
        raise BadRequestError(f"device {name!r} cannot be used: {reason}", "Try --device cpu.") from None
    if device.type == "cpu":
        _retain_freed_memory()
    return device


def _meant_device(name: str) -> str:
    """Return the hint for a name that is none of a device."""
    number = re.fullmatch(r"(?:gpu|nvidia)?:?(\d{1,4})?", name.strip().lower())
    if number is not None or name.lower().startswith("cuda"):
        digits = number[1] if number is not None else "".join(filter(str.isdecimal, name))
        return f"A GPU of NVIDIA is --device {f'cuda:{digits}' if digits else 'cuda'}; without one, use --device cpu."
    return "Devices are cpu, cuda, cuda:1 ...; try --device cpu."


def describe(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with the number of threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(errors="replace"))
        name = found[1].strip() if found else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return a context of mixed precision: matrix products in bfloat16, parameters and sums in float32.

    Args:
        device: Device of the forward pass.
        precision: `float32`, `bf16`, or `auto`, which is bf16 if the device has instructions for it.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=_uses_bf16(device, precision))


def cast_linear_layers(model: nn.Module, device: torch.device, precision: str) -> None:
    """Convert linear layers to the precision in which `autocast` multiplies them, for a model that only samples.

    The results do not change. Without gradients, autocast converts each matrix again in each forward pass, which moves
    four times as much memory as the product itself if there are few tokens.

    Args:
        model: Model whose linear layers are converted in place.
        device: Device on which the model will run.
        precision: Precision, as for `autocast`.
    """
    if _uses_bf16(device, precision):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)


def enabled_on_cuda(setting: bool | None, device: torch.device) -> bool:
    """Return the value of an optional switch; None means true on CUDA and false elsewhere."""
    return device.type == "cuda" if setting is None else setting


def attention_kernels(device: torch.device, tokens: int) -> AbstractContextManager[None]:
    """Return a context that selects the attention kernels for training on sequences of `tokens` tokens.

    PyTorch's own choice stays, except for short sequences on the CPU: there the backward pass of its blocked kernel
    takes seven times as long as plain matrix products (bf16, 17 tokens). It is faster from about 250 tokens on.
    """
    if device.type == "cpu" and tokens <= _PLAIN_ATTENTION_TOKENS:
        return sdpa_kernel([SDPBackend.MATH])
    return nullcontext()


def copied_to_cpu(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield copies of tensors on the CPU, in order; a GPU computes the next one while one is copied and used."""
    last: tuple[Tensor, torch.cuda.Event] | None = None
    for tensor in tensors:
        if not tensor.is_cuda:
            yield tensor
            continue
        copy, is_copied = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
        is_copied.record(torch.cuda.current_stream(tensor.device))
        if last is not None:
            yield _wait_for_copy(*last)
        last = copy, is_copied
    if last is not None:
        yield _wait_for_copy(*last)


def _wait_for_copy(copy: Tensor, is_copied: torch.cuda.Event) -> Tensor:
    is_copied.synchronize()
    return copy


@functools.cache
def matrix_rate(device: torch.device, precision: str) -> float:
    """Measure the operations per second of a large matrix product, as a reference for the speed of training.

    The best of five products counts; they take some tens of milliseconds. A process measures each rate once.

    Args:
        device: Device to measure.
        precision: Precision, as for `autocast`. Float32 uses the arithmetic of convolutions, which is TF32 on CUDA.
    """
    side = 8192 if device.type == "cuda" else 1536
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    with autocast(device, precision), torch.random.fork_rng():
        a, b = torch.randn(2, side, side, device=device)
        if torch.is_autocast_enabled(device.type):  # Converted once here instead of in each product.
            a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
        best = min(seconds(lambda: a @ b, device) for _ in range(5))
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2.0 * side**3 / best


def memory(device: torch.device) -> Memory:
    """Return the memory of a device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total / 2**30, free / 2**30)
    pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE")}
    total = available = pages["SC_PHYS_PAGES"] * pages["SC_PAGE_SIZE"]
    with suppress(OSError, ValueError, IndexError):  # Only Linux has these files.
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * int(lines["MemAvailable"].split()[0])
    for limit, used in _group_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Memory(total / 2**30, available / 2**30)


def process_memory() -> float:
    """Return the memory in GiB that this process holds; 0 if the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    return 0.0


_GROUP_FILES = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Files with the limit and the use of a control group, in both versions of their interface."""


def _group_limits(root: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """Yield the memory limit and the memory in use, in bytes, of each control group of this process that has a limit.

    Args:
        root: Folder in which the control groups are mounted.
        groups: File with the groups of this process, one line `NUMBER:CONTROLLERS:PATH` for each.
    """
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in _GROUP_FILES:
                # In a container, the root of the mount is often the process's own group.
                for folder in {root / controllers / path.lstrip("/"), root / controllers}:
                    with suppress(OSError, ValueError):  # The file is missing, or it says "max".
                        limit, used = (int((folder / name).read_text()) for name in _GROUP_FILES[controllers])
                        yield limit, used


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a function takes until the device has finished its work."""
    wait = torch.cuda.synchronize if device.type == "cuda" else _no_wait
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def _no_wait(device: torch.device) -> None:
    """Return at once: work on the CPU is finished when its function returns."""


def _uses_bf16(device: torch.device, precision: str) -> bool:
    return precision == "bf16" or (precision == "auto" and _has_bf16(device))


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        # The default of is_bf16_supported also accepts emulation.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # An older torch that does not report the capabilities uses float32, which is always correct.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _retain_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system; other C libraries stay as they are.

    By default glibc maps new memory for each tensor above 32 MB, and the system clears its pages each time. This takes
    a fifth of a training step at 256 x 256 pixels.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
