"""The shared course of the training commands, in this process: dry runs, refusals, locks, and the result."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from movq_cli import files
from movq_cli.commands import outlook, training
from movq_cli.commands.train_prior import train_prior
from movq_cli.commands.train_vq import train_vq
from movq_cli.commands.training import TrainRequest
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.runs import Run

JSON = Console(as_json=True, quiet=True)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", [train_vq, train_prior])
def test_a_dry_run_needs_no_data_and_writes_nothing(
    command: Callable[[TrainRequest, Console], None], tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = TrainRequest(str(tiny_yaml), ["train_vq.accumulate=2"], device_name="cpu", gpus=4, dry_run=True)
    command(request, JSON)
    plan = json.loads(capsys.readouterr().out)
    assert (plan["images"], plan["steps"], plan["ranks"]) == (None, 10, 4)
    assert plan["batch_size_at_once"] == 8 // 4 // (2 if command is train_vq else 1)
    assert plan["memory_gib"]["total"] >= 0
    assert plan["parameters"]["total"] > 0
    assert [path.name for path in Path().iterdir()] == [tiny_yaml.name]


def test_the_plan_says_how_many_epochs_a_number_of_steps_is(
    prepared: PreparedSet, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["train_vq.batch_size=16", "train_vq.steps=7"]  # There are 48 images, and so 3 steps in an epoch.
    train_vq(TrainRequest(str(tiny_yaml), changes, device_name="cpu", dry_run=True), JSON)
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["steps_per_epoch"], plan["epochs"]) == (7, 3, 2.33)


@pytest.mark.parametrize(("command", "dry_run"), [(train_vq, True), (train_vq, False), (train_prior, True)])
def test_a_batch_that_is_larger_than_the_set_is_refused_before_anything_is_measured(
    command: Callable[[TrainRequest, Console], None],
    dry_run: bool,
    prepared: PreparedSet,
    tiny_yaml: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = "train_vq" if command is train_vq else "train_prior"
    request = TrainRequest(str(tiny_yaml), [f"{section}.batch_size=8000"], device_name="cpu", dry_run=dry_run)
    monkeypatch.setattr(outlook, "measure", lambda *_, **__: pytest.fail("steps were measured"))
    for hours in (None, 1.0):
        message = r"the training split has \d+ images, fewer than one batch of 8000"
        with pytest.raises(BadRequestError, match=message):
            command(dataclasses.replace(request, hours=hours), JSON)


@pytest.mark.parametrize("command", [train_vq, train_prior])
def test_without_a_prepared_set_the_error_says_what_to_prepare(
    command: Callable[[TrainRequest, Console], None], tiny_yaml: Path
) -> None:
    with pytest.raises(BadRequestError, match=r"data, which does not exist.*--size 16"):
        command(TrainRequest(str(tiny_yaml), device_name="cpu"), JSON)


def test_a_prior_of_other_classes_or_without_a_tokenizer_is_refused_before_training(
    prepared: PreparedSet, tiny_yaml: Path
) -> None:
    with pytest.raises(BadRequestError, match=r"is for 5 classes, but .* has 3\. Set -o prior\.classes=3"):
        train_prior(TrainRequest(str(tiny_yaml), ["prior.classes=5"], device_name="cpu"), JSON)
    with pytest.raises(BadRequestError, match="no finished run of `movq train-vq` with these vq settings"):
        train_prior(TrainRequest(str(tiny_yaml), device_name="cpu"), JSON)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_locked_run_folder_is_refused_and_a_free_one_is_trained_and_given_as_the_result(
    prepared: PreparedSet, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = TrainRequest(str(tiny_yaml), ["train_vq.steps=2"], device_name="cpu")
    with (
        files.locked(Path("runs/tiny-vq"), "movq train-vq"),
        pytest.raises(
            BadRequestError, match=rf"another movq train-vq \(process {os.getpid()}\) is at work in runs/tiny-vq"
        ),
    ):
        train_vq(request, JSON)
    train_vq(request, JSON)
    result = json.loads(capsys.readouterr().out)
    assert (result["run"], result["step"]) == ("runs/tiny-vq", 2)
    assert Run(Path("runs/tiny-vq"), "vq").read().status == "finished"
    train_vq(request, JSON)
    assert json.loads(capsys.readouterr().out) == {"run": "runs/tiny-vq", "step": 2}


def test_images_much_larger_than_the_crop_are_warned_of(
    prepared: PreparedSet, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from movq_cli import presets

    for resolution, is_warned in ((16, False), (12, True)):
        settings = presets.load(str(tiny_yaml), [f"vq.resolution={resolution}", "vq.attention_resolutions=[]"])
        training.open_images(settings, "tiny", Console(quiet=True))
        assert ("prepare them with --size 12" in capsys.readouterr().err) == is_warned


def test_the_run_folder_is_the_named_one_or_that_of_the_preset() -> None:
    assert training.run_folder(Path("elsewhere"), "ffhq", "vq").folder == Path("elsewhere")
    assert training.run_folder(None, "ffhq", "vq").folder == Path("runs/ffhq-vq")
    assert training.run_folder(None, "folder/own.yaml", "prior", "auto").folder == Path("runs/own-auto")
