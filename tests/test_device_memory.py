"""The memory of a device: what the system says, and the limits of control groups."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from movq_cli import devices

CPU = torch.device("cpu")


def test_the_memory_of_the_cpu_is_that_of_the_system() -> None:
    total, available = devices.memory(CPU)
    assert 0 < available < total < 2**20


def test_a_process_holds_at_most_its_largest_memory() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert 0.05 < devices.process_memory() < peak + 0.1


@pytest.mark.parametrize("path", ["/outer/job", "/elsewhere"])
@pytest.mark.parametrize(
    ("controllers", "limit", "use"),
    [("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")],
)
def test_the_limit_of_a_control_group_is_found_in_its_folder_or_at_the_root(
    tmp_path: Path, path: str, controllers: str, limit: str, use: str
) -> None:
    folder = tmp_path / "cgroup" / controllers / ("outer/job" if path == "/outer/job" else "")
    folder.mkdir(parents=True)
    (folder / limit).write_text("1000\n")
    (folder / use).write_text("400\n")
    groups = tmp_path / "groups"
    groups.write_text(f"3:cpu:/other\n0:{controllers}:{path}\n")
    assert list(devices._group_limits(tmp_path / "cgroup", groups)) == [(1000, 400)]


def test_a_group_without_a_limit_has_none(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400\n")
    groups = tmp_path / "groups"
    groups.write_text("0::/\n")
    assert list(devices._group_limits(tmp_path, groups)) == []
    assert list(devices._group_limits(tmp_path, tmp_path / "missing")) == []
