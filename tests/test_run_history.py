"""The history of a run holds what its log says, and survives a log that is damaged or of an earlier version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from movq_cli import digested_lines, runs
from movq_cli.errors import BadRequestError
from movq_cli.run_history import RunHistory
from movq_cli.runs import Run
from movq_cli.settings import Preset

TIME = "2026-11-27T00:{:02d}:00+00:00"


def write_run(folder: Path, lines: list[object], tiny: Preset) -> RunHistory:
    """Write a run of 100 steps with this log, in which strings are lines as they are."""
    run = Run(folder, "vq")
    runs.write(run, runs.new_manifest("vq", preset_name="tiny", settings=tiny, steps=100, data="0" * 64))
    run.log.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return RunHistory.read(folder)


def test_metrics_of_each_part_are_read_by_step(tmp_path: Path, tiny: Preset) -> None:
    history = write_run(
        tmp_path,
        [
            {"step": 1, "time": TIME.format(1), "training": {"loss": 2.0}, "images_per_second": 5.0},
            {"step": 2, "time": TIME.format(2), "training": {"loss": float("nan"), "l1": 1}},
            {"step": 2, "time": TIME.format(3), "validation": {"psnr": 20.5, "usage_of_chunks": [0.5, 0.25]}},
            {"step": 4, "time": TIME.format(4), "validation": {"rfid": 9.0}},
        ],
        tiny,
    )
    assert list(history.series("loss")) == [(1, 2.0)]
    assert list(history.series("images_per_second")) == [(1, 5.0)]
    assert list(history.series("usage_of_chunks", "validation", 1)) == [(2, 0.25)]
    assert history.length("usage_of_chunks") == 2 and history.length("none") == 0
    assert history.last_validation == {"psnr": 20.5, "usage_of_chunks": [0.5, 0.25], "rfid": 9.0}
    assert history.last_step == 4


@pytest.mark.parametrize(
    "line",
    ["", '{"step": 7, "tim', "[1]", "7", '{"step": "x", "time": "y"}', '{"step": 3}', "[" * 100_000, "\0\0",
     '{"step": 1, "time": "2026-11-27T00:00:00"}'],
)  # fmt: skip
def test_a_damaged_line_is_passed_over(tmp_path: Path, tiny: Preset, line: str) -> None:
    good = {"step": 1, "time": TIME.format(1), "training": {"loss": 2.0}}
    history = write_run(tmp_path, [line, good, line], tiny)
    assert list(history.series("loss")) == [(1, 2.0)]
    assert history.damaged_lines == (1, 3)
    assert (
        history.damage is not None and "has 2 damaged lines, which are left out. Remove them: 1, 3." in history.damage
    )


def test_a_changed_number_is_left_out_and_named_and_a_half_line_is_none(tmp_path: Path, tiny: Preset) -> None:
    records = [{"step": step, "time": TIME.format(step), "training": {"loss": 2.0}} for step in range(1, 4)]
    lines = [digested_lines.encode(record).decode().rstrip("\n") for record in records]
    history = write_run(tmp_path, [lines[0], lines[1].replace("2.0", "9.0"), lines[2], lines[0]], tiny)
    assert list(history.series("loss")) == [(1, 2.0), (3, 2.0), (1, 2.0)]
    assert history.damaged_lines == (2,)
    history.run.log.write_text("\n".join([lines[0], lines[1], lines[2][:30]]))
    history = RunHistory.read(tmp_path)
    assert (history.damage, len(history.lines)) == (None, 2)


def test_sessions_tell_resumptions_and_the_time_of_work_without_the_pause(tmp_path: Path, tiny: Preset) -> None:
    session = {"command": ["movq", "train-vq"], "device": "a GPU", "ranks": 2, "discriminator_start": 4}
    history = write_run(
        tmp_path,
        [
            {"step": 0, "time": TIME.format(0), "session": session},
            {"step": 3, "time": TIME.format(6), "training": {"loss": 1.0}},
            {"step": 3, "time": TIME.format(30), "session": session | {"discriminator_start": 7}},
            {"step": 9, "time": TIME.format(36), "training": {"loss": 1.0}},
        ],
        tiny,
    )
    assert history.resumptions == (3,) and history.discriminator_start == 7
    assert history.hours == pytest.approx(0.2)
    assert history.command == "movq train-vq" and [session.ranks for session in history.sessions] == [2, 2]


def test_a_log_of_an_earlier_version_is_one_session(tmp_path: Path, tiny: Preset) -> None:
    line = {"step": 3, "time": TIME.format(6), "training": {"loss": 1.0}}
    history = write_run(tmp_path, [line, line | {"time": TIME.format(12)}], tiny)
    assert history.hours == pytest.approx(0.1) and history.resumptions == ()
    assert history.command == "movq train-vq --preset tiny" and history.discriminator_start == 4


def test_a_run_without_a_log_has_an_empty_history(tmp_path: Path, tiny: Preset) -> None:
    history = write_run(tmp_path, [], tiny)
    history.run.log.unlink()
    history = RunHistory.read(tmp_path)
    assert history.last_step == 0 and history.sessions == () and not len(history.series("loss"))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="is not a run folder"):
        RunHistory.read(tmp_path)
