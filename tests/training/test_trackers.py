"""Trackers get the metrics and pictures of a training, and one that fails costs a warning and not the run."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from movq_cli.console import Console
from movq_cli.data import grids
from movq_cli.errors import BadRequestError
from movq_cli.ranks import SINGLE_PROCESS
from movq_cli.runs import Run, new_manifest, write
from movq_cli.settings import Preset
from movq_cli.training import trackers
from movq_cli.training.log import Log
from movq_cli.training.trackers import Tracker


@pytest.fixture
def run(tiny: Preset, tmp_path: Path) -> Run:
    """A run folder with a manifest and a picture of step 2."""
    found = Run(tmp_path / "runs" / "tracked", "vq")
    write(found, new_manifest("vq", preset_name="tiny", settings=tiny, steps=9, data="0"))
    found.picture(2).parent.mkdir()
    grids.save(found.picture(2), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 2)
    return found


def log_of(run: Run, tiny: Preset, console: Console, done: int = 0, **settings: Any) -> Log:
    train = tiny.train_vq.model_copy(update={"tensorboard": False, **settings})
    return Log(run, console, train, SINGLE_PROCESS, steps=9, reference=None, done=done)


def train(log: Log, steps: range) -> None:
    """Log the losses 1 / step, and one validation with a picture."""
    with log:
        for step in steps:
            log.add({"l1": torch.tensor(1 / step)})
            log.flush(step)
        log.validation(steps[-1], {"psnr": 20.0 + steps[-1], "usage_of_chunks": [0.5, 0.25]})
        log.picture(2)
        log.sync()


def test_wandb_records_a_run_offline(
    run: Run, tiny: Preset, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (pip install 'movq[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    train(log_of(run, tiny, Console(quiet=True), wandb=True), range(1, 4))
    out, said = capfd.readouterr()
    assert out == "" and "warning" not in said
    wandb.teardown()  # At the latest, wandb writes its file at the end of the process.
    (file,) = (run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    data = file.read_bytes()
    assert f"tracked-{run.read().started[:4]}".encode() in data
    for key in (
        b"l1",
        b"validation/psnr",
        b"validation/usage_of_chunks/1",
        b"images_per_second",
        b"adversarial_weight",
    ):
        assert key in data
    (picture,) = file.parent.glob("files/media/images/validation/picture*.png")
    assert picture.read_bytes() == run.picture(2).read_bytes()


def test_trackio_records_a_run_on_this_machine(
    run: Run, tiny: Preset, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # The library reads it when it is imported.
    pytest.importorskip("trackio", reason="trackio is not installed (pip install 'movq[trackio]')")
    train(log_of(run, tiny, Console(quiet=True), trackio=True), range(1, 4))
    out, said = capfd.readouterr()
    assert out == "" and "warning" not in said
    (file,) = (tmp_path / "trackio").glob("movq*.db")
    with contextlib.closing(sqlite3.connect(file)) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    assert [step for step, _ in rows][:3] == [1, 2, 3]
    assert any("validation/psnr" in json.loads(metrics) for _, metrics in rows)


class Broken(Tracker):
    """A tracker that records two steps and then fails, as one whose server has gone."""

    recorded: list[int]

    def __init__(self, _run: Run, _done: int) -> None:
        super().__init__("broken cannot record the run")
        self.recorded = []

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if len(self.recorded) == 2:
            raise ConnectionError("the server\nhas gone")
        self.recorded.append(step)

    def picture(self, path: Path, step: int) -> None:
        raise AssertionError("a tracker that has failed is used again")

    def flush(self) -> None:
        raise AssertionError("a tracker that has failed is used again")

    close = flush


def test_a_tracker_that_fails_costs_one_warning_and_the_log_goes_on(
    run: Run, tiny: Preset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", (Broken, "TensorBoard"))
    train(log_of(run, tiny, Console(quiet=True), tensorboard=True), range(1, 6))
    line = "warning: broken cannot record the run (the server has gone); the training goes on without its events\n"
    assert capsys.readouterr().err == line
    assert len(run.log.read_text().splitlines()) == 6


def test_a_library_that_does_not_start_is_a_bad_request_before_the_training(
    run: Run, tiny: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_run: Run, _done: int) -> Tracker:
        raise RuntimeError("no account")

    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", (refuse, "TensorBoard"))
    with pytest.raises(BadRequestError, match="tensorboard does not start: no account"):
        log_of(run, tiny, Console(quiet=True), tensorboard=True).__enter__()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_are_off_unless_set_and_a_missing_library_is_named(tiny: Preset, name: str) -> None:
    settings = tiny.train_vq.model_copy(update={"tensorboard": False})
    assert trackers.requested(settings) == []
    settings = settings.model_copy(update={name: True})
    if find_spec(name) is not None:
        assert trackers.requested(settings) == [name]
        return
    with pytest.raises(BadRequestError, match=f"{name}=true, but {name} is not installed. Install it: pip install"):
        trackers.requested(settings)
