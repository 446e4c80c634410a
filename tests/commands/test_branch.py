"""A run that goes on otherwise: kept checkpoints, branches from them, and settings that change on the way."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from movq_cli.run_manifest import RunManifest
from movq_cli.runs import Run
from tests.conftest import Movq

pytestmark = pytest.mark.slow


def manifest(folder: Path) -> RunManifest:
    return Run(folder, "vq").read()


def test_a_branch_with_equal_settings_ends_with_the_weights_of_its_origin(movq: Movq, trained: Path) -> None:
    # The tiny preset's discriminator starts at step 4, and the checkpoint before its first step always stays.
    origin = trained / "runs" / "tiny-vq"
    assert Run(origin, "vq").kept_steps() == [4]
    out = movq("train-vq", "--from", "runs/tiny-vq@4", "--run", "runs/branch").stdout
    assert out.strip() == "runs/branch"
    branch = trained / "runs" / "branch"
    weights = [(folder / "tokenizer.safetensors").read_bytes() for folder in (origin, branch)]
    assert weights[0] == weights[1]
    (change,) = manifest(branch).history
    assert (change.step, change.branched_from, change.settings) == (4, "runs/tiny-vq", {})
    assert manifest(origin).history == ()
    assert "no errors" in movq("check", "runs/branch").stdout


def test_a_discriminator_that_set_in_too_early_is_taken_back(movq: Movq, trained: Path) -> None:
    later = ["-o", "train_vq.discriminator_start=8", "-o", "train_vq.adversarial_weight=0.1"]
    result = movq("train-vq", "--from", "runs/tiny-vq@4", "--run", "runs/branch", *later)
    assert "step 8: the adversarial loss begins" in result.stderr
    branch = trained / "runs" / "branch"
    lines = [json.loads(line) for line in (branch / "log.jsonl").read_text().splitlines()]
    with_loss = [line["step"] for line in lines if "generator" in line.get("training", {})]
    assert with_loss == [9, 10]
    (change,) = manifest(branch).history
    assert change.settings == {
        "train_vq.discriminator_start": (4, 8),
        "train_vq.adversarial_weight": (0.8, 0.1),
    }
    # The same command again finds the run finished, and a longer one resumes it.
    assert "finished already" in movq("train-vq", "--from", "runs/tiny-vq@4", "--run", "runs/branch", *later).stderr
    longer = [*later, "-o", "train_vq.steps=12"]
    movq("train-vq", "--from", "runs/tiny-vq@4", "--run", "runs/branch", *longer)
    assert (manifest(branch).step, manifest(branch).history[-1].settings) == (12, {"train_vq.steps": (10, 12)})
    # The branch is a run like any other: it needs its origin no longer.
    shutil.rmtree(trained / "runs" / "tiny-vq")
    movq("train-vq", "--preset", "runs/branch/settings.yaml", "--run", "runs/branch", "-o", "train_vq.steps=13")
    assert manifest(branch).step == 13


@pytest.mark.parametrize("step", ["", "@4"])
def test_a_branch_without_its_checkpoint_is_not_trained_from_random_weights(
    movq: Movq, trained: Path, step: str
) -> None:
    movq("train-vq", "--from", "runs/tiny-vq@4", "--run", "runs/branch")
    branch = trained / "runs" / "branch"
    weights, history = (branch / "tokenizer.safetensors").read_bytes(), manifest(branch).history
    resume = ["train-vq", "--preset", "runs/branch/settings.yaml", "--run", "runs/branch"]
    (branch / "checkpoint.pt").unlink()
    assert "finished already" in movq(*resume).stderr
    (branch / "tokenizer.safetensors").unlink()
    refused = movq(*resume, code=2).stderr.splitlines()[-1]
    assert "runs/branch went on from step 4 of runs/tiny-vq, and checkpoint.pt" in refused
    assert "Add --from runs/tiny-vq@4 to begin" in refused
    assert manifest(branch).step == 10
    movq(*resume, "--from", f"runs/tiny-vq{step}")
    assert (branch / "tokenizer.safetensors").read_bytes() == weights
    (before,), (after,) = history, manifest(branch).history
    assert (after.step, after.branched_from) == (before.step, before.branched_from)


def test_a_run_without_its_checkpoint_says_that_it_starts_again(movq: Movq, trained: Path, tiny_yaml: Path) -> None:
    run = trained / "runs" / "tiny-vq"
    weights = (run / "tokenizer.safetensors").read_bytes()
    for name in ("checkpoint.pt", "tokenizer.safetensors"):
        (run / name).unlink()
    said = movq("train-vq", "--preset", tiny_yaml).stderr
    assert re.search(r"checkpoint.pt is missing: the run starts again from step 0,\s+though 10 steps were done", said)
    assert (run / "tokenizer.safetensors").read_bytes() == weights


def test_a_resumed_run_records_the_settings_that_changed(movq: Movq, trained: Path, tiny_yaml: Path) -> None:
    changed = ["-o", "train_vq.steps=12", "-o", "train_vq.l2_weight=0.5", "-o", "train_vq.keep_checkpoints=1"]
    movq("train-vq", "--preset", tiny_yaml, *changed)
    run = manifest(trained / "runs" / "tiny-vq")
    (change,) = run.history
    assert (change.step, change.branched_from) == (10, None)
    assert change.settings == {
        "train_vq.steps": (10, 12),
        "train_vq.l2_weight": (0.0, 0.5),
        "train_vq.keep_checkpoints": (0, 1),
    }


def test_the_newest_checkpoints_stay_beside_the_one_before_the_discriminator(
    movq: Movq, trained: Path, tiny_yaml: Path
) -> None:
    every_second = ["-o", "train_vq.checkpoint_every=2", "-o", "train_vq.keep_checkpoints=2"]
    movq("train-vq", "--preset", tiny_yaml, "--run", "runs/kept", *every_second)
    run = Run(trained / "runs" / "kept", "vq")
    assert run.kept_steps() == [4, 6, 8, 10]
    for step in run.kept_steps():
        state = torch.load(run.kept_checkpoint(step), weights_only=True)
        assert (state["step"], state["run"]) == (step, run.read().started)
    assert run.checkpoint.samefile(run.kept_checkpoint(10))
    damaged = run.kept_checkpoint(6)
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "00000006.pt is damaged" in movq("check", "runs/kept", code=1).stderr
    assert "00000006.pt is damaged" in movq("train-vq", "--from", "runs/kept@6", "--run", "runs/b", code=2).stderr
    movq("train-vq", "--from", "runs/kept@8", "--run", "runs/b")


def test_a_branch_may_have_another_discriminator_or_none_or_an_average_that_its_origin_had_not(
    movq: Movq, trained: Path, tiny_yaml: Path
) -> None:
    movq("train-vq", "--preset", tiny_yaml, "--run", "runs/plain", "-o", "train_vq.ema_decay=0")
    for name, change in (
        ("wide", "train_vq.discriminator_channels=16"),
        ("none", "train_vq.adversarial_weight=0"),
        ("averaged", "train_vq.ema_decay=0.9"),
    ):
        movq("train-vq", "--from", "runs/plain", "--run", f"runs/{name}", "-o", change, "-o", "train_vq.steps=12")
        assert manifest(trained / "runs" / name).status == "finished"
    # A run without a discriminator may get one when it is resumed.
    again = ["-o", "train_vq.adversarial_weight=0.8", "-o", "train_vq.steps=14"]
    movq("train-vq", "--from", "runs/plain", "--run", "runs/none", *again)
    assert manifest(trained / "runs" / "none").step == 14


def test_a_prior_is_branched_too(movq: Movq, trained: Path) -> None:
    change = ["-o", "train_prior.base_learning_rate=1e-5", "-o", "train_prior.steps=12"]
    movq("train-prior", "--from", "runs/tiny-prior", "--run", "runs/slow", *change)
    movq("sample", "out", "--n", "1", "--run", "runs/slow")


@pytest.mark.parametrize("command", ["train-vq", "train-prior"])
def test_a_branch_without_a_name_is_refused(movq: Movq, trained: Path, command: str) -> None:
    origin = "runs/tiny-vq" if command == "train-vq" else "runs/tiny-prior"
    refused = movq(command, "--from", origin, code=2).stderr
    assert "the new run has no name. Name its folder with --run, or give a preset with --preset" in refused
    assert not (trained / "runs" / "settings-prior").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--from", "runs/none", "--run", "runs/b"],
            "there is no run folder runs/none. Give --from as RUN",
        ),
        (
            ["--from", "runs/tiny-vq@7", "--run", "runs/b"],
            "has no checkpoint of step 7. It has those of .* 4, 10",
        ),
        (["--from", "runs/tiny-vq", "--run", "runs/b"], "would end at step 10.*has done 10 steps.*train_vq.steps"),
        (["--from", "runs/tiny-vq@4", "--run", "runs/tiny-vq"], "both the run to start from and the new run"),
        (["--from", "runs/tiny-prior", "--run", "runs/b", "-o", "train_vq.steps=20"], "is a run of `movq train-prior`"),
        (
            ["--from", "runs/tiny-vq@4", "--run", "runs/b", "-o", "vq.codebook_size=32"],
            "trained with other settings .vq.codebook_size: 16 before, 32 now",
        ),
        (["--run", "runs/b"], "no preset is given. Name one with --preset"),
    ],
)
def test_a_branch_that_cannot_be_is_one_line_and_leaves_nothing(
    movq: Movq, trained: Path, arguments: list[str], words: str
) -> None:
    refused = movq("train-vq", *arguments, code=2).stderr
    last = refused.splitlines()[-1]
    assert re.search(words, last), last
    assert not (trained / "runs" / "b").exists()
