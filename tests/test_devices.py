"""Devices are selected by name, and an unavailable one is a bad request."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from movq_cli import devices
from movq_cli.errors import BadRequestError


def test_a_device_is_selected_by_its_name() -> None:
    assert devices.select("cpu") == torch.device("cpu")
    assert devices.select().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:x"])
def test_an_unavailable_device_is_a_bad_request(name: str) -> None:
    with pytest.raises(BadRequestError, match="--device cpu"):
        devices.select(name)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrix_products_have_the_given_precision(precision: str, dtype: torch.dtype) -> None:
    with devices.autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_on_the_cpu_each_tensor_is_yielded_before_the_next_is_computed() -> None:
    order: list[str] = []

    def make(number: int) -> torch.Tensor:
        order.append(f"computed {number}")
        return torch.tensor(number)

    for tensor in devices.copied_to_cpu(map(make, range(3))):
        order.append(f"yielded {tensor.item()}")
    assert order == [f"{event} {number}" for number in range(3) for event in ("computed", "yielded")]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_on_the_cpu_new_tensors_reuse_freed_memory() -> None:
    devices.select("cpu")
    pages = 2**26 // resource.getpagesize()
    faults = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(2**26, dtype=torch.uint8).add_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < pages / 10
