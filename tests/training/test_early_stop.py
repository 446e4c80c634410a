"""Early stopping: a training ends when its validations no longer improve, and only then, also when it is resumed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from movq_cli import checkpoints, runs
from movq_cli.console import Console
from movq_cli.errors import InterruptedRunError
from movq_cli.ranks import Ranks
from movq_cli.report import summary
from movq_cli.run_history import RunHistory
from movq_cli.run_manifest import RunManifest
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training import loop
from movq_cli.training.log import DeviceMetrics, Metrics
from movq_cli.training.watch import UNWATCHED, Watch
from tests.conftest import on_ranks
from tests.training.toy import EvaluatedStage, ToyStage

PSNR = {2: 5.0, 4: 7.0, 6: 6.0, 8: 7.0, 10: 6.5, 12: 9.0, 14: 8.0, 16: 8.0}
"""PSNR at each validation: the second is the best one until the sixth."""


class Scripted(ToyStage):
    """Its validations have the values of a table."""

    stops_at: int | None = None
    """Step at which the process receives SIGTERM."""
    settled_after = 0

    def step(self, batch: Tensor, step: int) -> DeviceMetrics:
        if step + 1 == self.stops_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(batch, step)

    def validate(self, watch: Watch = UNWATCHED, *, averaged: bool = True) -> Metrics:
        self.calls.append(("validate", self.done))
        return {"psnr": PSNR[self.done]}


def preset_with(tiny: Preset, early_stop: int | None, **changes: object) -> Preset:
    values = {"early_stop": early_stop, "log_every": 1, "validate_every": 2, "checkpoint_every": 100, **changes}
    return tiny.model_copy(update={"train_vq": tiny.train_vq.model_copy(update={**values, "evaluate_every": 0})})


def train(stage: ToyStage, run: Run, preset: Preset, steps: int = 16, console: Console | None = None) -> Metrics:
    manifest = runs.start_or_resume(
        run, runs.new_manifest("vq", preset_name="tiny", settings=preset, steps=steps, data="d")
    )
    return loop.train(stage, run, manifest, console or Console(quiet=True))


def trained(folder: Path, preset: Preset, *, stops_at: int | None = None, **attributes: Any) -> tuple[Scripted, Run]:
    stage, run = Scripted(preset.train_vq), Run(folder, "vq")
    stage.stops_at = stops_at
    for name, value in attributes.items():
        setattr(stage, name, value)
    train(stage, run, preset)
    return stage, run


def facts_of(manifest: RunManifest) -> dict[str, Any]:
    return manifest.model_dump(exclude={"started", "finished", "digest", "history", "settings"})


@pytest.mark.parametrize(
    ("limit", "last", "best", "since"), [(1, 6, 4, 1), (2, 8, 4, 2), (3, 10, 4, 3), (4, 16, 12, 2), (None, 16, 12, 2)]
)
def test_a_run_ends_after_so_many_validations_without_a_better_one(
    tmp_path: Path, tiny: Preset, limit: int | None, last: int, best: int, since: int
) -> None:
    stage, run = trained(tmp_path / "run", preset_with(tiny, limit))
    manifest = run.read()
    assert (stage.done, manifest.step, manifest.best_step, manifest.validations_since_best) == (last, last, best, since)
    assert (manifest.status, manifest.stopped_early, manifest.steps) == ("finished", last < 16, 16)
    assert manifest.finished is not None
    state = torch.load(run.checkpoint, weights_only=True)
    assert (state["step"], state["best"]["validations_since"]) == (last, since)
    assert run.weights.is_file()
    assert run.best.is_file()
    assert runs.find_run(None, "vq", root=tmp_path).folder == run.folder


def test_the_run_says_that_it_stopped_early_and_which_weights_are_the_best(
    tmp_path: Path, tiny: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    run, preset = Run(tmp_path / "run", "vq"), preset_with(tiny, 2)
    train(Scripted(preset.train_vq), run, preset, console=Console())
    text = " ".join(capsys.readouterr().err.split())
    assert "stopped early at step 8 of 16: psnr was not better than at step 4 in 2 validations" in text
    assert "--weights-of best" in text
    assert runs.find_best(run.folder, "vq") == run.best  # The remedy works.
    rows = {row[0]: row[1] for row in summary.facts(RunHistory.read(run.folder)).rows}
    assert rows["progress"] == "step 8 of 16, finished early, 2 validations after the best"
    assert rows["best"] == "psnr 7 at step 4"
    assert json.loads(run.manifest_file.read_text())["stopped_early"] is True


@pytest.mark.parametrize("stops_at", [3, 6, 9])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, tiny: Preset, stops_at: int) -> None:
    preset = preset_with(tiny, 3)
    _, complete = trained(tmp_path / "complete", preset)
    with pytest.raises(InterruptedRunError, match=f"step {stops_at} of 16"):
        trained(tmp_path / "parts", preset, stops_at=stops_at)
    _, parts = trained(tmp_path / "parts", preset)
    assert facts_of(parts.read()) == facts_of(complete.read())
    assert parts.read().step == 10
    assert parts.weights.read_text() == complete.weights.read_text()
    assert parts.best.read_text() == complete.best.read_text()


def test_a_signal_at_the_step_of_the_early_stop_does_not_interrupt_it(tmp_path: Path, tiny: Preset) -> None:
    _, run = trained(tmp_path, preset_with(tiny, 3), stops_at=10)
    assert (run.read().status, run.read().step) == ("finished", 10)


class KilledError(BaseException):
    """Stands for the end of the process."""


def test_a_run_killed_between_its_checkpoint_and_its_end_makes_no_more_steps(
    tmp_path: Path, tiny: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = preset_with(tiny, 3)
    save = checkpoints.save_state

    def killed(*arguments: Any) -> None:
        save(*arguments)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_state", killed)
        with pytest.raises(KilledError):
            trained(tmp_path, preset)
    assert Run(tmp_path, "vq").read().status == "running"
    stage = Scripted(preset.train_vq)
    stage.done = 10  # A toy does not store the number of its steps.
    train(stage, Run(tmp_path, "vq"), preset)
    manifest = Run(tmp_path, "vq").read()
    assert (manifest.status, manifest.step, manifest.validations_since_best) == ("finished", 10, 3)
    assert stage.calls == [("validate", 10), ("draw", 10)]


def test_a_run_that_stopped_early_stays_finished_until_the_setting_allows_more(tmp_path: Path, tiny: Preset) -> None:
    _, run = trained(tmp_path, preset_with(tiny, 2))
    for limit, status in ((2, "finished"), (1, "finished"), (3, "running"), (None, "running")):
        manifest = runs.new_manifest("vq", preset_name="tiny", settings=preset_with(tiny, limit), steps=16, data="d")
        before = run.manifest_file.read_bytes()
        assert runs.start_or_resume(run, manifest).status == status
        run.manifest_file.write_bytes(before)
    _, again = trained(tmp_path, preset_with(tiny, 3))
    assert (again.read().step, again.read().stopped_early, again.read().validations_since_best) == (10, True, 3)
    _, again = trained(tmp_path, preset_with(tiny, None))
    assert (again.read().step, again.read().stopped_early, again.read().best_step) == (16, False, 12)


def test_validations_before_the_stage_has_settled_do_not_count(tmp_path: Path, tiny: Preset) -> None:
    _, run = trained(tmp_path, preset_with(tiny, 2), settled_after=6)
    assert (run.read().step, run.read().validations_since_best) == (10, 2)


def test_a_checkpoint_of_a_run_without_this_count_is_read(tmp_path: Path, tiny: Preset) -> None:
    preset = preset_with(tiny, 2)
    with pytest.raises(InterruptedRunError):
        trained(tmp_path, preset, stops_at=7)
    run = Run(tmp_path, "vq")
    state = checkpoints.load_state(run.checkpoint, torch.device("cpu"), "")
    del state["best"]["validations_since"]
    checkpoints.save_state(run.checkpoint, state)
    trained(tmp_path, preset)
    assert run.read().step == 10  # The count begins at the resumption.


class Evaluated(EvaluatedStage):
    """Only evaluations have its criterion."""

    def evaluate(self, watch: Watch = UNWATCHED) -> Metrics:
        return {"rfid": 10.0 + self.done}


def test_only_validations_with_the_criterion_count(tmp_path: Path, tiny: Preset) -> None:
    run, preset = Run(tmp_path, "vq"), preset_with(tiny, 2, validate_every=1)
    train(Evaluated(preset.train_vq), run, preset)
    assert (run.read().best_step, run.read().step) == (3, 9)


class Disagreeing(Scripted):
    """Rank 1 sees every validation improve."""

    def validate(self, watch: Watch = UNWATCHED, *, averaged: bool = True) -> Metrics:
        return {"psnr": PSNR[self.done] if self.ranks.is_first else float(self.done)}


def _train_on(ranks: Ranks, argument: tuple[Path, Preset]) -> int:
    folder, preset = argument
    stage, run = Disagreeing(preset.train_vq, ranks), Run(folder, "vq")
    manifest = ranks.from_first(
        lambda: runs.start_or_resume(
            run, runs.new_manifest("vq", preset_name="tiny", settings=preset, steps=16, data="d")
        )
    )
    loop.train(stage, run, manifest, Console(quiet=True))
    return stage.done


def test_all_ranks_end_at_the_step_of_the_first_one(tmp_path: Path, tiny: Preset) -> None:
    results = on_ranks(_train_on, (tmp_path / "run", preset_with(tiny, 3)), tmp_path, 2)
    assert results == [10, 10]
    assert Run(tmp_path / "run", "vq").read().stopped_early


def test_the_prior_and_the_tokenizer_say_when_they_have_settled(tiny: Preset, tmp_path: Path) -> None:
    from tests.training.test_prior_training import in_mode, stage_of

    changes = {"random_order": "0.25-0.75", "steps": 20, "epochs": None}
    preset = tiny.model_copy(update={"train_prior": tiny.train_prior.model_copy(update=changes)})
    assert stage_of(in_mode(preset, "auto"), tmp_path / "random").settled_after == 15
    assert stage_of(tiny, tmp_path / "plain").settled_after == 0
