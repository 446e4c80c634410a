"""The expected hours and memory of a training, `--hours`, and the refusal of what cannot fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from movq_cli import devices
from movq_cli.commands.train_prior import train_prior
from movq_cli.commands.train_vq import train_vq
from movq_cli.commands.training import TrainRequest
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.devices import Memory
from movq_cli.errors import BadRequestError
from movq_cli.ranks import Ranks
from movq_cli.run_manifest import RunManifest
from movq_cli.runs import Run
from movq_cli.training import pace
from tests.conftest import on_ranks

pytestmark = pytest.mark.slow

JSON = Console(as_json=True, quiet=True)
LARGE = ["train_vq.batch_size=48", "train_vq.adversarial_weight=0", "vq.channels=256", "vq.embed_dim=128"]
"""A training with all images in each batch; it needs 1.8 GiB."""


@pytest.fixture(autouse=True)
def _short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pace, "_SECONDS", 0.1)


def manifest() -> RunManifest:
    return Run(Path("runs/tiny-vq"), "vq").read()


def test_a_run_of_given_hours_is_one_of_so_many_steps_and_goes_on_as_one(
    prepared: PreparedSet, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["train_vq.discriminator_start=50%", "train_vq.checkpoint_every=100000"]

    def train(*more: str, hours: float | None = None, run: str | None = None) -> None:
        path = None if run is None else Path(run)
        train_vq(TrainRequest(str(tiny_yaml), [*overrides, *more], run=path, device_name="cpu", hours=hours), JSON)

    train(hours=0.0004)
    first = manifest()
    assert (first.hours, first.status, first.settings.train_vq.epochs) == (0.0004, "finished", None)
    assert first.steps == first.settings.train_vq.steps
    # A new run of this number of steps has the same weights: the measurement changed nothing.
    train(f"train_vq.steps={first.steps}", run="other")
    weights = [(folder / "tokenizer.safetensors").read_bytes() for folder in (Path("runs/tiny-vq"), Path("other"))]
    assert weights[0] == weights[1]
    # The same command again, and the one without hours, find it finished.
    for hours in (0.0004, None):
        train(hours=hours)
        assert (manifest().steps, manifest().hours, manifest().history) == (first.steps, 0.0004, ())
    # Other hours give another length, which is not below what is done; a number of steps takes precedence.
    train(hours=1e-7)
    assert (manifest().steps, manifest().hours) == (first.steps, 1e-7)
    train(f"train_vq.steps={first.steps + 1}")
    assert (manifest().steps, manifest().step, manifest().hours) == (first.steps + 1, first.steps + 1, None)
    capsys.readouterr()


@pytest.mark.parametrize("length", ["steps=5", "epochs=1"])
def test_hours_beside_steps_or_epochs_are_refused(prepared: PreparedSet, tiny_yaml: Path, length: str) -> None:
    with pytest.raises(BadRequestError, match=rf"--hours and -o train_vq\.{length} both give the length"):
        train_vq(TrainRequest(str(tiny_yaml), [f"train_vq.{length}"], device_name="cpu", hours=1), JSON)
    assert not (Path("runs") / "tiny-vq" / "run.json").exists()


@pytest.mark.parametrize("command", [train_vq, train_prior])
def test_a_dry_run_with_hours_has_a_length_of_about_these_hours(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str], command: Any
) -> None:
    command(TrainRequest(str(tiny_yaml), device_name="cpu", hours=2, dry_run=True), JSON)
    plan = json.loads(capsys.readouterr().out)
    assert plan["hours"] == pytest.approx(2, rel=0.01)
    rounding = 0.5e-4 * plan["steps"] + 0.5e-3 * 3600  # the time of a step has four decimals, and the hours have three
    assert plan["steps"] * plan["seconds_per_step"] == pytest.approx(7200, abs=rounding + plan["seconds_per_step"])
    assert plan["time_from"] == "measured steps"
    assert 0 < plan["peak_memory_gib"] < plan["device_memory_gib"]["total"]


def test_what_cannot_fit_is_refused_and_every_named_remedy_fits(
    prepared: PreparedSet, tiny_yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What other programs leave of this machine's memory changes between the remedy and its trial.
    monkeypatch.setattr(devices, "memory", lambda device: Memory(1.3, 1.3))
    monkeypatch.setattr(devices, "process_memory", lambda: 0.0)
    with pytest.raises(BadRequestError, match=r"needs about [\d.]+ GiB of memory, but cpu has") as refused:
        train_vq(TrainRequest(str(tiny_yaml), LARGE, device_name="cpu"), JSON)
    assert not (Path("runs") / "tiny-vq" / "run.json").exists()
    remedies = re.findall(r"-o (train_vq\.\S+=\w+(?: -o train_vq\.\S+=\w+)*)", str(refused.value))
    assert {remedy.partition("=")[0] for remedy in remedies} >= {"train_vq.accumulate", "train_vq.batch_size"}
    # A dry run plans for another machine too, so that it only warns.
    train_vq(TrainRequest(str(tiny_yaml), LARGE, device_name="cpu", dry_run=True), JSON)
    assert "warning: on this machine, the training needs about" in capsys.readouterr().err
    for remedy in remedies:
        changes = [*LARGE, "train_vq.steps=1", *remedy.split(" -o ")]
        train_vq(TrainRequest(str(tiny_yaml), changes, device_name="cpu", dry_run=True), JSON)
        out, err = capsys.readouterr()
        plan = json.loads(out)
        assert plan["peak_memory_gib"] < plan["device_memory_gib"]["total"]
        assert err == ""


def _lengths(ranks: Ranks, argument: tuple[Path, Path]) -> tuple[int, float | None]:
    import os

    folder, preset = argument
    os.chdir(folder)
    pace._SECONDS = 0.1
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(ranks.rank), str(ranks.world_size)
    from movq_cli import presets
    from movq_cli.commands.outlook import Outlook
    from movq_cli.commands.training import find_images

    settings = presets.load(str(preset))
    outlook = Outlook("vq", find_images(settings), _cpu(), None, ranks.world_size, ranks)
    chosen, hours = outlook.length(settings, str(preset), (), 0.01, Run(Path("runs/none"), "vq"))
    assert chosen.train_vq.steps is not None
    return chosen.train_vq.steps, hours


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def test_all_ranks_choose_the_same_number_of_steps(prepared: PreparedSet, tiny_yaml: Path, tmp_path: Path) -> None:
    first, second = on_ranks(_lengths, (tmp_path, tiny_yaml), tmp_path, 2)
    assert first == second
    assert first[0] > 1
