"""Devices are picked by name, and an impossible one is a bad request."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from movq_cli import devices
from movq_cli.errors import BadRequestError


def test_the_device_named_is_the_device_given() -> None:
    assert devices.select("cpu") == torch.device("cpu")
    assert devices.select().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:x"])
def test_a_device_that_is_not_there_is_a_bad_request(name: str) -> None:
    with pytest.raises(BadRequestError, match="--device cpu"):
        devices.select(name)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_named_is_that_of_matrix_products(precision: str, dtype: torch.dtype) -> None:
    with devices.autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_on_the_cpu_each_tensor_is_given_before_the_next_is_made() -> None:
    order: list[str] = []

    def make(number: int) -> torch.Tensor:
        order.append(f"made {number}")
        return torch.tensor(number)

    for tensor in devices.copied_to_cpu(map(make, range(3))):
        order.append(f"given {tensor.item()}")
    assert order == [f"{what} {number}" for number in range(3) for what in ("made", "given")]


def test_on_the_cpu_tensors_come_to_take_the_memory_of_those_before() -> None:
    devices.select("cpu")
    pages = 2**26 // resource.getpagesize()
    faults = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(2**26, dtype=torch.uint8).add_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < pages / 10
