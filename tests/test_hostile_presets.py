"""Preset files that are huge, expand to huge values, or hold impossible ones are refused in one short line."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from movq_cli import presets
from movq_cli.errors import BadRequestError


def refused(path: Path, text: str) -> str:
    """Return the message about a preset file."""
    path.write_text(text)
    with pytest.raises(BadRequestError) as caught:
        presets.load(str(path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    assert str(path) in message
    return message


def laughs(levels: int, item: str, join: str) -> str:
    """Return a YAML text in which each level names the one before it nine times."""
    lines = [f"a0: &a0 {item}"]
    lines += [f"a{n}: &a{n} {join % ', '.join([f'*a{n - 1}'] * 9)}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("text", [laughs(12, "[lol]", "[%s]"), laughs(12, "{lol: 1}", "{<<: [%s]}")])
def test_aliases_of_aliases_are_refused_without_expanding_them(tmp_path: Path, text: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert "its aliases stand for more than 10000 values" in refused(tmp_path / "laughs.yaml", text)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 2
    assert after.ru_maxrss - before.ru_maxrss < 100_000  # kB


def test_a_few_aliases_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "aliases.yaml"
    path.write_text("base: digits\ntrain_vq: {batch_size: &size 8}\ntrain_prior: {batch_size: *size}\n")
    assert presets.load(str(path)).train_prior.batch_size == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1000, "nested too deeply"),
        ("vq: &a [*a]", "nested too deeply, or in itself"),
        ("train_vq: {steps: " + "9" * 5000 + "}", "is not valid YAML"),
        ("train_vq: {steps: 2026-99-99}", "is not valid YAML"),
        ("description: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        ("train_vq: {steps: " + "x" * 500_000 + "}", "x..."),
    ],
)
def test_impossible_values_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path / "preset.yaml", text)


def test_a_file_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRequestError, match=r"huge\.yaml is no preset: it has over 1048576 bytes"):
        presets.load(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("value", ["2026-99-99", "9" * 5000, "[" * 1000])
def test_an_impossible_value_of_an_override_is_refused(value: str) -> None:
    with pytest.raises(BadRequestError, match=r"train_vq\.steps"):
        presets.load("digits", [f"train_vq.steps={value}"])
