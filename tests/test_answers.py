"""Answers to misspelt settings and devices, and to the variables that a shell has kept: each names what works."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from movq_cli import cores, devices, presets, signals
from movq_cli.cli.options import require_used_settings
from movq_cli.errors import BadRequestError


@pytest.mark.parametrize(
    ("name", "command", "hint"),
    [
        ("steps", "train-vq", "Did you mean 'train_vq.steps'?"),
        ("batch_size", "train-vq", "Did you mean 'train_vq.batch_size'?"),
        ("train_vq.Batch_Size", "train-vq", "Did you mean 'train_vq.batch_size'?"),
        ("Train-VQ.batch-size", "train-vq", "Did you mean 'train_vq.batch_size'?"),
        ("LR", "train-vq", "Did you mean 'train_vq.base_learning_rate'?"),
        ("data.Path", "train-vq", "Did you mean 'data.path'?"),
    ],
)
def test_an_unknown_setting_is_answered_by_one_that_the_command_uses(name: str, command: str, hint: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        require_used_settings([f"{name}=6"], {"vq", "train_vq"}, command)
    assert str(caught.value) == f"unknown setting {name!r}. {hint}"


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("vq.multipliers=1,1,2,3", "vq.multipliers=[1,1,2,3]"),
        ("vq.multipliers=(1, 1, 2, 3)", "vq.multipliers=[1,1,2,3]"),
        ("vq.attention_resolutions=8", "vq.attention_resolutions=[8]"),
        ("vq.multipliers=1 1 2 3", "vq.multipliers=[1,1,2,3]"),
    ],
)
def test_values_without_brackets_are_answered_by_the_list_that_works(override: str, right: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        presets.load("digits", [override])
    assert f"'{right}'" in str(caught.value)
    presets.load("digits", [right])


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("gpu", "there is no device 'gpu'. A GPU of NVIDIA is --device cuda; without one, use --device cpu."),
        ("GPU:1", "there is no device 'GPU:1'. A GPU of NVIDIA is --device cuda:1; without one, use --device cpu."),
        ("0", "there is no device '0'. A GPU of NVIDIA is --device cuda:0; without one, use --device cpu."),
        ("cuda0", "there is no device 'cuda0'. A GPU of NVIDIA is --device cuda:0; without one, use --device cpu."),
        ("tpu", "there is no device 'tpu'. Devices are cpu, cuda, cuda:1 ...; try --device cpu."),
    ],
)
def test_a_name_that_is_no_device_is_answered_by_one(name: str, answer: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        devices.select(name)
    assert str(caught.value) == answer


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without MPS")
def test_a_missing_kind_of_device_is_one_short_sentence() -> None:
    with pytest.raises(BadRequestError, match=r"^device 'mps' cannot be used: this machine, or the .* device\. Try"):
        devices.select("mps")


def test_a_process_that_is_not_one_of_several_speaks_whatever_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert signals.is_first_rank()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not signals.is_first_rank()


def test_cores_are_those_of_the_affinity_and_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores.allowed_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cores.allowed_cores() == len(before)
    for quota, number in (("max 100000", len(before)), ("50000 100000", 1), ("9900000 100000", len(before))):
        (tmp_path / "cpu.max").write_text(quota)
        assert cores.allowed_cores() == number
