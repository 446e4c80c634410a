"""The rows of the ablation differ only in what the rows of Figure 6a differ in."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablation
from benchmarks.commands import read_log
from movq_cli import presets
from movq_cli.settings import Preset


def differing(one: Preset, other: Preset) -> set[str]:
    """Return the dotted names of the stage 1 settings in which two presets differ; modulation is one setting."""
    found = set()
    for section in ("data", "vq", "train_vq"):
        a, b = getattr(one, section), getattr(other, section)
        found |= {f"{section}.{name}" for name in type(a).model_fields if getattr(a, name) != getattr(b, name)}
    return found


def test_the_first_row_is_vqgan_and_the_last_one_is_the_preset_itself() -> None:
    first, last = ablation.resolve(ablation.ROWS[0], 32).vq, ablation.resolve(ablation.ROWS[-1], 32)
    assert (first.chunks, first.initial_feature, first.modulation) == (1, "quantized", None)
    assert (last.vq.chunks, last.vq.initial_feature) == (4, "fourier")
    assert last == presets.load(str(ablation.PRESET))


def test_each_row_changes_what_the_paper_s_presets_change() -> None:
    steps = [(ablation.resolve(a, 32), ablation.resolve(b, 32)) for a, b in pairwise(ablation.ROWS)]
    paper = [(presets.load(a.paper), presets.load(b.paper)) for a, b in pairwise(ablation.ROWS)]
    assert [differing(*pair) for pair in steps] == [differing(*pair) for pair in paper]
    assert [differing(*pair) for pair in steps] == [
        {"vq.chunks"},
        {"vq.initial_feature", "vq.modulation"},
        {"vq.initial_feature"},
        {"vq.initial_feature"},
    ]


def test_every_row_is_one_of_the_paper_s() -> None:
    assert [row.paper_rfid for row in ablation.ROWS] == [4.42, 3.78, 3.52, 3.48, 2.26]


@pytest.mark.parametrize("row", ablation.ROWS, ids=lambda row: row.name)
def test_extra_settings_reach_every_row_but_not_what_makes_it_one(row: ablation.Row) -> None:
    extra = ablation.resolve(row, 32, ("train_vq.seed=7", "vq.initial_feature=projected", "vq.modulation.levels=3"))
    plain = ablation.resolve(row, 32)
    assert extra.train_vq.seed == 7
    assert extra.vq.initial_feature == plain.vq.initial_feature
    assert (extra.vq.modulation is None) == (plain.vq.modulation is None)


def test_attention_stays_at_the_code_grid_whatever_the_side() -> None:
    for side in (32, 64):
        settings = ablation.resolve(ablation.ROWS[-1], side).vq
        assert settings.attention_resolutions == (settings.code_shape.height,)


def test_what_a_killed_run_logged_twice_counts_once(tmp_path: Path) -> None:
    def line(step: int, **record: Any) -> str:
        return json.dumps({"step": step, **record}) + "\n"

    log = tmp_path / "log.jsonl"
    log.write_text(
        line(10, images_per_second=4.0)
        + line(20, images_per_second=1.0)
        + line(20, validation={"psnr": 1.0})
        + line(20, images_per_second=8.0)
        + line(20, validation={"psnr": 2.0})
        + line(25, images_per_second=10.0)
        + line(25, validation={"psnr": 3.0})
    )
    curve, seconds = read_log(log, batch_size=8)
    assert curve == [{"step": 20, "psnr": 2.0}, {"step": 25, "psnr": 3.0}]
    assert seconds == 10 * 8 / 4 + 10 * 8 / 8 + 5 * 8 / 10
