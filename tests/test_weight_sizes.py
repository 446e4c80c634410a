"""A small weight file whose settings are those of a huge network is refused before memory is taken."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from movq_cli.checkpoints import TokenizerHeader, load_prior, load_tokenizer
from movq_cli.errors import BadRequestError
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings, TokenizerSettings

VQ: dict[str, Any] = TokenizerSettings().model_dump(mode="json")
PRIOR: dict[str, Any] = PriorSettings().model_dump(mode="json")
SHAPE: dict[str, Any] = CodeShape(height=16, width=16, chunks=4, codebook_size=1024).model_dump(mode="json")


def write(path: Path, header: dict[str, Any]) -> Path:
    save_file({"a": torch.zeros(2)}, path, {"movq": json.dumps(header)})
    return path


def assert_refused(path: Path, load: Any) -> None:
    tracemalloc.start()
    with pytest.raises(BadRequestError, match=path.name):
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"channels": 65536, "embed_dim": 65536, "initial_feature": "quantized"},
        {"codebook_size": 10**9},
        {"blocks": 10**6},
        {"multipliers": [1] * 10**5},
        {"channels": 10**300},
        {"chunks": -1},
        {"quantizer": "none of ours"},
    ],
)
def test_a_tokenizer_of_any_declared_size(tmp_path: Path, change: dict[str, Any]) -> None:
    header = TokenizerHeader(vq=TokenizerSettings()).model_dump(mode="json") | {"vq": VQ | change}
    assert_refused(write(tmp_path / "a.safetensors", header), load_tokenizer)


@pytest.mark.parametrize(
    ("prior", "shape"),
    [
        ({"layers": 10**6}, {}),
        ({"layers": 1024, "width": 65536, "hidden": 2**20}, {}),
        ({}, {"height": 2**14, "width": 2**14}),
        ({}, {"codebook_size": 10**9}),
        ({"mode": "none of ours"}, {}),
    ],
)
def test_a_prior_of_any_declared_size(tmp_path: Path, prior: dict[str, Any], shape: dict[str, Any]) -> None:
    header = {
        "prior": PRIOR | prior,
        "shape": SHAPE | shape,
        "sample": SampleSettings().model_dump(mode="json"),
        "classes": [],
        "tokenizer": "0" * 64,
    }
    assert_refused(write(tmp_path / "a.safetensors", header), load_prior)


@pytest.mark.parametrize("length", [10**18, 2**64 - 1, 0, 10**6])
def test_a_header_of_any_declared_length(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    assert_refused(path, load_tokenizer)


def test_a_tensor_of_a_hundred_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    text = json.dumps({"a": {"dtype": "F32", "shape": [25_000, 10**6], "data_offsets": [0, 10**11]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(100))
    assert_refused(path, load_tokenizer)
