"""Agreement of the ranks: whether they have equal settings, files and weights, and whether they share a folder.

Ranks that differ would train in silence on averages that mean nothing. Every rank calls each of these functions; all
ranks then return, or all raise the same error, which names the ranks and the hosts that differ.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import atomic_write
from movq_cli.ranks import Ranks

_SAME_COMMAND = "Start every rank with the same command, the same files and the same versions."

_SHARED_SECONDS = 5.0
"""Time in which a new file must be visible on other machines: network file systems cache the content of folders."""

_MARK = ".shared-"
"""Start of the names of the files by which the ranks find out whether they share a folder."""

_STALE_SECONDS = 3600.0
"""Age from which such a file is the one of a killed run. A rank may look for it some minutes after it was written."""

_CHUNK = 2**18
"""Number of values that are hashed at once, which limits the memory of a fingerprint to some MB."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type of the same size, by the bytes of a value."""

_ODD_MULTIPLIERS = (-7046029254386353131, -4658895280553007687)
"""Odd numbers with irregular bits, 0x9E3779B97F4A7C15 and 0xBF58476D1CE4E5B9 as signed integers of 64 bits."""


def require_same(ranks: Ranks, facts: Mapping[str, object], remedy: str = _SAME_COMMAND) -> None:
    """Check that facts are equal on all ranks.

    Args:
        ranks: Ranks of the run.
        facts: Values by name; of those that differ, the first one is reported.
        remedy: Sentence that says what to do if they differ.

    Raises:
        BadRequestError: A fact of a rank differs from that of rank 0.
    """
    if ranks.world_size == 1:
        return
    first, *others = ranks.all_gather(dict(facts))
    for rank, found in enumerate(others, start=1):
        for name in [*first, *(name for name in found if name not in first)]:
            ours, theirs = first.get(name, "absent"), found.get(name, "absent")
            if ours != theirs:
                raise BadRequestError(
                    f"{name} is {theirs} on {ranks.describe(rank)}, but {ours} on {ranks.describe(0)}", remedy
                )


def require_same_content(ranks: Ranks, name: str, path: Path, digest: str) -> None:
    """Check that a file or folder, of which every machine may have its own copy, has the same content on all ranks.

    Args:
        ranks: Ranks of the run.
        name: Description of the file or folder.
        path: Its path on this rank.
        digest: Hash of its content, in hexadecimal.

    Raises:
        BadRequestError: The content differs.
    """
    first, *others = ranks.all_gather((str(path.absolute()), digest))
    for rank, (their_path, theirs) in enumerate(others, start=1):
        if theirs != first[1]:
            raise BadRequestError(
                f"{name} {their_path} of {ranks.describe(rank)} is not {name} {first[0]} of {ranks.describe(0)}: "
                f"its hash is {theirs[:12]}, not {first[1][:12]}",
                f"Copy {first[0]} from {ranks.describe(0)}, or name a folder that all machines share.",
            )


def require_shared(ranks: Ranks, folder: Path) -> None:
    """Check that the ranks of all machines see the same folder; this costs nothing if there is one machine.

    Rank 0 writes a file that no other run can have, and every rank looks for it. If the folder does not exist, its
    nearest existing parent is checked.

    Args:
        ranks: Ranks of the run.
        folder: Folder into which the ranks will write, or from which they read what others have written.

    Raises:
        BadRequestError: A rank does not see the folder of rank 0.
        FailureError: Rank 0 cannot write to the folder.
    """
    if ranks.is_one_machine:
        return
    absolute = folder.absolute()
    levels, name = ranks.from_first(lambda: _mark(absolute))
    mark = [absolute, *absolute.parents][levels] / name
    try:
        is_visible = ranks.all_gather(_appears(mark))
    finally:
        if ranks.is_first:
            with suppress(OSError):
                mark.unlink()
    blind = [rank for rank, visible in enumerate(is_visible) if not visible]
    if blind:
        path = ranks.from_first(lambda: absolute)
        raise BadRequestError(
            f"{path} of {ranks.describe(0)} is not visible on {_names(ranks, blind)}",
            "Use a folder that all machines share, as on a network file system, or run the command on one machine.",
        )


def _mark(folder: Path) -> tuple[int, str]:
    """Write a file with a unique name, and return its name and the number of levels between it and the folder."""
    name = f"{_MARK}{uuid.uuid4().hex}"
    levels, existing = next((n, path) for n, path in enumerate([folder, *folder.parents]) if path.is_dir())
    atomic_write(existing / name, b"")
    _remove_stale_marks(existing, existing / name)
    return levels, name


def _remove_stale_marks(folder: Path, mark: Path) -> None:
    """Remove the marks that killed runs have left; their age is measured by the clock of the file system."""
    with suppress(OSError):
        now = mark.stat().st_mtime
        for path in folder.glob(f"{_MARK}*"):
            if now - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    """Return whether a file exists, or appears within some seconds."""
    end = time.monotonic() + _SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def broadcast_state(ranks: Ranks, state: object) -> Any:  # noqa: ANN401 - a state is any nesting of values
    """Return the state of rank 0 on all ranks.

    Args:
        ranks: Ranks of the run.
        state: Nested dictionaries and lists of tensors and plain values; only that of rank 0 is used.

    Returns:
        The state, with its tensors on the CPU.
    """
    # The tensors are not sent with the plain values, because pickling would take the memory of the state twice.
    outline = ranks.from_first(lambda: map_tensors(state, lambda tensor: tensor.detach().to("meta")))
    own = tensors_of(state) if ranks.is_first else None

    def receive(empty: Tensor) -> Tensor:
        tensor = torch.empty(empty.shape, dtype=empty.dtype) if own is None else next(own).detach().cpu().contiguous()
        if tensor.numel():
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)
        return tensor

    return map_tensors(outline, receive)


def require_same_state(ranks: Ranks, states: Mapping[str, object], moment: str, remedy: str) -> None:
    """Check that the weights, optimizers and averages are equal on all ranks, bit by bit.

    Args:
        ranks: Ranks of the run.
        states: State of each part of the training, as `state_dict` returns it.
        moment: When they are compared, such as "after step 100".
        remedy: Sentence that says what to do if they differ.

    Raises:
        FailureError: They differ; the ranks that differ from the majority are named.
    """
    if ranks.world_size == 1:
        return
    found = ranks.all_gather(fingerprints(states))
    common, _ = Counter(tuple(of_rank.values()) for of_rank in found).most_common(1)[0]
    differing = [rank for rank, of_rank in enumerate(found) if tuple(of_rank.values()) != common]
    if differing:
        reference = next(rank for rank in range(len(found)) if rank not in differing)
        part = next(name for name in states if found[differing[0]][name] != found[reference][name])
        raise FailureError(
            f"{moment} the weights or optimizer states of {_names(ranks, differing)} differ from those of "
            f"{ranks.describe(reference)} (part {part!r})",
            remedy,
        )


def fingerprints(states: Mapping[str, object]) -> dict[str, str]:
    """Return a hash of each state: of the bits of its tensors, in their order, and of its plain values.

    The hash of a tensor is computed on its device. The host waits for each device once.
    """
    totals = tensor_sums(list(states.values()))
    sums = torch.stack([total.cpu() for total in totals]).sum(0).tolist() if totals else [0] * len(states)
    outlines = [repr(map_tensors(state, lambda tensor: (tensor.shape, tensor.dtype))) for state in states.values()]
    return {
        name: f"{value & 2**64 - 1:016x}-{hashlib.sha256(outline.encode()).hexdigest()[:16]}"
        for name, value, outline in zip(states, sums, outlines, strict=True)
    }


@torch.no_grad()
def tensor_sums(states: Sequence[object]) -> list[Tensor]:
    """Return for each device a tensor, int64 [number of states]: the weighted sums of the bits of its tensors.

    A value is weighted with an odd number that depends on its position, modulo 2^64. So one changed value always
    changes the sum, and several changed or exchanged values practically always. The host does not wait.
    """
    totals: dict[torch.device, Tensor] = {}
    weights: dict[torch.device, Tensor] = {}
    for row, state in enumerate(states):
        for number, tensor in enumerate(tensors_of(state)):
            device = tensor.device
            if device not in totals:
                totals[device] = torch.zeros(len(states), dtype=torch.int64, device=device)
                weights[device] = _odd_numbers(torch.arange(_CHUNK, device=device))
            bits = tensor.detach().view(_INTEGERS[tensor.element_size()]).reshape(-1)
            for chunk, part in enumerate(bits.split(_CHUNK)):
                digest = hashlib.sha256(f"{number} {chunk}".encode()).digest()
                factor = int.from_bytes(digest[:8], "little", signed=True) | 1
                totals[device][row] += (part * weights[device][: len(part)]).sum() * factor
    return list(totals.values())


def _odd_numbers(positions: Tensor) -> Tensor:
    """Return an odd number with irregular bits for each position, int64."""
    mixed = positions * _ODD_MULTIPLIERS[0]
    return ((mixed ^ (mixed >> 31)) * _ODD_MULTIPLIERS[1]) | 1


def tensors_of(state: object) -> Iterator[Tensor]:
    """Yield the tensors of a nested state, in their order."""
    if isinstance(state, Tensor):
        yield state
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    for part in parts:
        yield from tensors_of(part)


def map_tensors(state: object, change: Callable[[Tensor], object]) -> Any:  # noqa: ANN401 - as for broadcast_state
    """Return a nested state with the result of a function in place of each tensor."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: map_tensors(part, change) for key, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map_tensors(part, change) for part in state)
    return state


def _names(ranks: Ranks, chosen: Sequence[int]) -> str:
    """Return up to three ranks with their hosts, and the number of the others."""
    more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
    return ", ".join(map(ranks.describe, chosen[:3])) + more
