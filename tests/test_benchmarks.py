"""What the benchmarks count and leave out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import measure, training
from benchmarks.machine import machine


def test_arithmetic_is_counted_forward_and_backward() -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1)
    images = torch.randn(2, 4, 5, 6, requires_grad=True)
    with measure.Arithmetic() as forward:
        out = layer(images)
    with measure.Arithmetic() as backward:
        torch.autograd.grad(out.sum(), [images, *layer.parameters()])
    assert forward.flops == 2 * (2 * 8 * 5 * 6) * (4 * 3 * 3)
    assert backward.flops == 2 * forward.flops


def test_without_the_peer_its_absence_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    assert training.why_no_peer(tmp_path) == "no package taming"


def test_the_record_says_where_and_when() -> None:
    assert machine().keys() == {"processor", "cores", "python", "torch", "date"}
