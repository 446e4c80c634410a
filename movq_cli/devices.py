"""Which device computes, and in which precision."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from movq_cli.errors import BadRequestError

_FEW_TOKENS = 64

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""glibc's malloc.h."""


def select(name: str | None = None) -> torch.device:
    """The device of a name such as `cuda`, `cuda:1` or `cpu`; without one, CUDA where there is one.

    Where it is the CPU, the process keeps from now on the memory that it frees, for the tensors to come.

    Raises:
        BadRequestError: No such device here.
    """
    if name is None and torch.cuda.is_available():
        return torch.device("cuda")
    try:
        device = torch.device("cpu" if name is None else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadRequestError(f"device {name!r} cannot be used: {reason}", "Try --device cpu.") from None
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Mixed precision around a forward pass: matrices in bfloat16, parameters and sums in float32.

    Args:
        device: Where the pass runs.
        precision: `float32`, `bf16`, or `auto`: bf16 where the device has instructions for it.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=_lowers(device, precision))


def cast_linear_layers(model: nn.Module, device: torch.device, precision: str) -> None:
    """Keep linear layers in the precision in which `autocast` multiplies them, for a model that only draws.

    The results are the same. Without gradients autocast converts every matrix at every pass, which reads and writes
    four times what a pass of few tokens needs.

    Args:
        model: Whose linear layers are changed in place.
        device: Where it will run.
        precision: As for `autocast`.
    """
    if _lowers(device, precision):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)


def enabled_on_cuda(setting: bool | None, device: torch.device) -> bool:
    """A setting that is null where we choose: on for CUDA, off elsewhere."""
    return device.type == "cuda" if setting is None else setting


def attention_kernels(device: torch.device, tokens: int) -> AbstractContextManager[None]:
    """The attention kernels for training on sequences of a length.

    Left to itself, except on the CPU for a few tokens: there the backward pass of PyTorch's blocked kernel takes seven
    times as long as plain matrix products do (bf16, 17 tokens); from some 250 tokens on it is the faster one.
    """
    if device.type == "cpu" and tokens <= _FEW_TOKENS:
        return sdpa_kernel([SDPBackend.MATH])
    return nullcontext()


def copied_to_cpu(made: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors on the CPU, in their order; a GPU makes the next one while one is brought and used."""
    last: tuple[Tensor, torch.cuda.Event] | None = None
    for tensor in made:
        if not tensor.is_cuda:
            yield tensor
            continue
        here, there = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
        there.record(torch.cuda.current_stream(tensor.device))
        if last is not None:
            yield _arrived(*last)
        last = here, there
    if last is not None:
        yield _arrived(*last)


def _arrived(here: Tensor, there: torch.cuda.Event) -> Tensor:
    there.synchronize()
    return here


def matrix_rate(device: torch.device, precision: str) -> float:
    """Operations a second of one large matrix product, the best of a few: what a step's arithmetic is held against.

    Args:
        device: Where; some tens of milliseconds are spent on it.
        precision: As for `autocast`. Float32 is measured in the arithmetic of convolutions: TF32 on CUDA.
    """
    side = 8192 if device.type == "cuda" else 1536
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    with autocast(device, precision), torch.random.fork_rng():
        a, b = torch.randn(2, side, side, device=device)
        if torch.is_autocast_enabled(device.type):  # converted once, not with each product
            a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
        best = min(seconds(lambda: a @ b, device) for _ in range(5))
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2.0 * side**3 / best


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long something takes, until the device is done with it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else _do_nothing
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def _do_nothing(device: torch.device) -> None:
    """The CPU is done when it says so."""


def _lowers(device: torch.device, precision: str) -> bool:
    return precision == "bf16" or (precision == "auto" and _has_bf16(device))


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        # Not is_bf16_supported's default, which also counts emulation.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # An older torch that cannot tell stays in float32, which is never wrong.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _keep_freed_memory() -> None:
    """Have glibc hand no freed memory back to the system; other C libraries are left as they are.

    It would map every activation above 32 MB anew, and the system would clear its pages each time: a fifth of a
    training step at 256 x 256.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
