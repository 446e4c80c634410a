"""A preset means what a person reads: repeated keys and numbers that YAML 1.1 would change are errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movq_cli import presets, strict_yaml
from movq_cli.errors import BadRequestError


def refused(folder: Path, text: str, *overrides: str) -> str:
    """Return the message about a preset with this text."""
    (folder / "own.yaml").write_text(text)
    with pytest.raises(BadRequestError) as caught:
        presets.load(str(folder / "own.yaml"), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "lines"),
    [
        (
            "base: digits\ntrain_vq: {steps: 6}\ntrain_prior: {steps: 6}\ntrain_vq: {batch_size: 16}\n",
            "train_vq",
            (2, 4),
        ),
        ("train_vq:\n  steps: 6\n  'steps': 7\n", "train_vq.steps", (2, 3)),
        ("base: digits\n\nbase: digits\n", "base", (1, 3)),
        ("vq:\n  modulation:\n    levels: 1\n    # a comment\n    levels: 1\n", "vq.modulation.levels", (3, 5)),
        ("views: &v {mirror: true}\ntrain_vq:\n  <<: *v\n  <<: *v\n", "train_vq.<<", (3, 4)),
    ],
)
def test_a_repeated_key_is_an_error_with_both_lines(
    tmp_path: Path, text: str, name: str, lines: tuple[int, int]
) -> None:
    message = refused(tmp_path, text)
    assert f"{name} is given twice, in lines {lines[0]} and {lines[1]}" in message
    assert "own.yaml" in message


def test_a_key_that_is_repeated_in_one_line_or_in_a_base_or_in_an_override_is_an_error(tmp_path: Path) -> None:
    assert "train_vq.steps is given twice, in line 1" in refused(tmp_path, "train_vq: {steps: 6, steps: 7}\n")
    (tmp_path / "parent.yaml").write_text("base: digits\nvq: {chunks: 4}\nvq: {blocks: 1}\n")
    assert f"{tmp_path / 'parent.yaml'}: vq is given twice" in refused(tmp_path, "base: parent.yaml\n")
    assert "chunks is given twice" in refused(tmp_path, "base: digits\n", "vq={chunks: 1, chunks: 4}")


def test_a_merge_key_may_give_what_is_also_written(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "base: digits\ntrain_vq: &t {batch_size: 8}\ntrain_prior: {<<: *t, batch_size: 4}\n"
    )
    assert presets.load(str(tmp_path / "own.yaml")).train_prior.batch_size == 4


@pytest.mark.parametrize("number", ["1:30", "-1:30", "1:30:00", "1:30.5", "010", "-010", "+07", "0_10", "00", "0777"])
def test_a_number_in_base_60_or_in_octal_does_not_become_another_number(tmp_path: Path, number: str) -> None:
    message = refused(tmp_path, f"base: digits\ntrain_vq:\n  warmup_steps: {number}\n")
    assert f"train_vq.warmup_steps, line 3: {number} would be a number" in message
    assert f"setting train_vq.warmup_steps: {number} would" in refused(
        tmp_path, "base: digits\n", f"train_vq.warmup_steps={number}"
    )
    assert number in refused(tmp_path, "base: digits\n", f"vq.multipliers=[1, {number}]")


@pytest.mark.parametrize("number", ["010", "-010", "0_10", "00"])
def test_the_remedies_of_an_octal_number_work(tmp_path: Path, number: str) -> None:
    message = refused(tmp_path, "base: digits\n", f"description={number}")
    quoted = re.search("'.*'", message)
    plain = re.search(r"\((-?\d+)\)", message)
    assert quoted and plain
    assert presets.load("digits", [f"description={quoted[0]}"]).description == number
    assert strict_yaml.parse(plain[1]) == int(number)


@given(st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_in_its_usual_form_is_read_as_it_is(number: float) -> None:
    value = strict_yaml.parse(str(number))
    assert float(value) == number  # YAML 1.1 reads 1e-05 as a text, which pydantic turns into the number.


@pytest.mark.parametrize("word", ["yes", "on", "true", "No", "OFF"])
def test_a_truth_value_is_no_number(word: str) -> None:
    for override in (f"train_vq.warmup_steps={word}", f"train_vq.l1_weight={word}", f"vq.multipliers=[1, {word}]"):
        with pytest.raises(BadRequestError, match="truth value"):
            presets.load("digits", [override])


@pytest.mark.parametrize("word", ["yes", "on", "true", "1"])
def test_a_truth_value_is_allowed_where_it_belongs(word: str) -> None:
    assert presets.load("digits", [f"train_vq.tensorboard={word}"]).train_vq.tensorboard is True
