"""Agreement of the ranks: any changed bit is found, and every rank raises the same error, which names the hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from movq_cli import agreement
from movq_cli.errors import MovqError
from movq_cli.ranks import SINGLE_PROCESS, Machine, Ranks
from tests.conftest import on_ranks

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def fingerprint(state: object) -> str:
    return agreement.fingerprints({"part": state})["part"]


@given(st.integers(0, 999), st.integers(0, 31))
def test_every_changed_bit_changes_the_fingerprint(position: int, bit: int) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    changed = tensor.clone()
    changed.view(torch.int32)[position] ^= torch.tensor(1, dtype=torch.int32) << bit
    assert fingerprint(tensor) != fingerprint(changed)


@pytest.mark.parametrize("position", [0, agreement._CHUNK - 1, agreement._CHUNK, 2 * agreement._CHUNK + 4])
def test_a_changed_value_is_found_in_every_chunk(position: int) -> None:
    tensor = torch.zeros(2 * agreement._CHUNK + 5)
    changed = tensor.clone()
    changed[position] = -0.0
    assert fingerprint(tensor) != fingerprint(changed)


@given(st.lists(st.integers(-3, 3), min_size=3, max_size=40), st.randoms())
def test_values_in_another_order_have_another_fingerprint(values: list[int], random: Any) -> None:
    shuffled = random.sample(values, len(values))
    assert (fingerprint(torch.tensor(values)) == fingerprint(torch.tensor(shuffled))) == (values == shuffled)


def test_changes_that_cancel_in_a_plain_sum_are_found() -> None:
    tensor = torch.arange(64)
    changed = tensor.clone()
    changed[10:13] += torch.tensor([1, -2, 1])
    assert fingerprint(tensor) != fingerprint(changed)


def test_the_fingerprint_depends_on_values_types_and_plain_values_but_not_on_the_memory_format() -> None:
    images = torch.randn(2, 3, 4, 5)
    assert fingerprint(images) == fingerprint(images.to(memory_format=torch.channels_last))
    states = [torch.zeros(2, 3), torch.zeros(3, 2), {"a": torch.zeros(2, 3), "lr": 1.0}, {"a": torch.zeros(2, 3)}]
    states += [torch.zeros(2, dtype=kind) for kind in TYPES] + [torch.zeros(0), torch.tensor(0.0), [torch.zeros(3)] * 2]
    assert len({fingerprint(state) for state in states}) == len(states)


class NoWaiting(TorchDispatchMode):
    """Refuse an operation for which the host waits for the device."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert operation.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        result = operation(*args, **(kwargs or {}))
        assert not isinstance(result, Tensor) or result.device.type == "cuda"
        return result


def test_the_sums_are_computed_on_the_device_and_the_host_does_not_wait() -> None:
    with FakeTensorMode():
        states = [{"a": torch.empty(4, 5, device="cuda"), "b": [torch.empty((), device="cuda")]}] * 2
        with NoWaiting():
            (sums,) = agreement.tensor_sums(states)
        assert (sums.device.type, sums.shape) == ("cuda", (2,))


# --- two ranks --------------------------------------------------------------------------------------------------------


@contextmanager
def refused(found: dict[str, str], name: str) -> Iterator[None]:
    """Record the error of the block, with its exit code."""
    try:
        yield
        found[name] = "accepted"
    except MovqError as error:
        found[name] = f"{error.exit_code}: {error}"


def disagree(ranks: Ranks, folder: Path) -> dict[str, str]:
    ranks = replace(ranks, machines=(Machine("left", "0"), Machine("right", "1")))
    found: dict[str, str] = {}
    own_folder = folder / f"node{ranks.rank}"
    same = {"a": torch.ones(2), "b": torch.arange(3)}
    other = {**same, "b": torch.arange(3) + (torch.arange(3) == ranks.rank + 5)}
    changed = {**same, "b": torch.tensor([0, 1, 2 + ranks.rank])}
    cases: dict[str, Callable[[], object]] = {
        "same": lambda: agreement.require_same(ranks, {"x": [1], "y": "z"}),
        "value": lambda: agreement.require_same(ranks, {"x": 1, "y": ranks.rank}),
        "absent": lambda: agreement.require_same(ranks, {"x": 1} if ranks.rank else {"x": 1, "y": 2}),
        "content": lambda: agreement.require_same_content(ranks, "the set", own_folder, f"{ranks.rank}" * 64),
        "copies": lambda: agreement.require_same_content(ranks, "the set", own_folder, "0" * 64),
        "shared": lambda: agreement.require_shared(ranks, folder / "new" / "cache"),
        "unshared": lambda: agreement.require_shared(ranks, own_folder / "cache"),
        "equal states": lambda: agreement.require_same_state(ranks, {"model": same, "uses": other}, "at 1", "Do."),
        "states": lambda: agreement.require_same_state(ranks, {"uses": same, "model": changed}, "after step 7", "Do."),
    }
    for name, case in cases.items():
        with refused(found, name):
            case()
    return found


def test_every_rank_refuses_the_same_difference_with_the_same_words(tmp_path: Path) -> None:
    for node in (0, 1):
        (tmp_path / f"node{node}").mkdir()
    found, others = on_ranks(disagree, tmp_path, tmp_path, world=2)
    assert found == others
    assert {name for name, text in found.items() if text == "accepted"} == {"same", "copies", "shared", "equal states"}
    assert found["value"].startswith("2: y is 1 on rank 1 on right, but 0 on rank 0 on left. Start every rank")
    assert found["absent"].startswith("2: y is absent on rank 1 on right, but 2 on rank 0 on left.")
    assert (
        f"the set {tmp_path}/node1 of rank 1 on right is not the set {tmp_path}/node0 of rank 0 on left: "
        in (found["content"])
    )
    assert "its hash is 111111111111, not 000000000000. Copy" in found["content"]
    assert found["unshared"].startswith(
        f"2: {tmp_path}/node0/cache of rank 0 on left is not visible on rank 1 on right. Use a folder that all machines"
    )
    assert found["states"] == (
        "1: after step 7 the weights or optimizer states of rank 1 on right differ from those of rank 0 on left "
        "(part 'model'). Do."
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.pt", "1.pt", "node0", "node1"]


def receive(ranks: Ranks, _: object) -> dict[str, Any]:
    ranks = replace(ranks, machines=(Machine("left", "0"), Machine("right", "1")))
    tensors = {str(kind): torch.full((3, 2), 1 - ranks.rank, dtype=kind) for kind in TYPES}
    nested = {
        "empty": torch.zeros(0),
        "scalar": torch.tensor(2.5),
        "list": [torch.arange(4).view(2, 2).T, "text", None],
    }
    state = {"step": 3, 5: tensors, "nested": nested} if ranks.is_first else None
    result: dict[str, Any] = agreement.broadcast_state(ranks, state)
    return result


def test_a_state_that_only_rank_0_has_arrives_on_the_others_bit_by_bit(tmp_path: Path) -> None:
    first, second = on_ranks(receive, None, tmp_path, world=2)
    assert fingerprint(first) == fingerprint(second)
    assert second["step"] == 3
    assert second["nested"]["list"][1:] == ["text", None]
    assert torch.equal(second["nested"]["list"][0], torch.tensor([[0, 2], [1, 3]]))
    assert all(bool(second[5][str(kind)].all()) and second[5][str(kind)].dtype == kind for kind in TYPES)


def test_one_machine_checks_no_folder_and_one_process_compares_nothing(tmp_path: Path) -> None:
    agreement.require_shared(SINGLE_PROCESS, tmp_path / "missing")
    agreement.require_same(SINGLE_PROCESS, {"x": 1})
    agreement.require_same_content(SINGLE_PROCESS, "the set", tmp_path, "0")
    agreement.require_same_state(SINGLE_PROCESS, {"model": torch.ones(1)}, "at 1", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["folder", "folder/file"])
def test_only_an_existing_folder_is_marked(tmp_path: Path, file: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    levels, name = agreement._mark(tmp_path / file)
    assert (tmp_path / "folder" / name).is_file()
    assert levels == file.count("/")
