"""Fine-tuning: runs that begin with trained weights, with their discriminator or a new one, with parts frozen."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from movq_cli.runs import Run
from tests.conftest import Movq

pytestmark = pytest.mark.slow


def validations(run: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation"] for line in lines if "validation" in line}


def test_fine_tuning_begins_with_the_metrics_and_the_discriminator_of_its_weights(movq: Movq, trained: Path) -> None:
    out = movq("train-vq", "--init", "runs/tiny-vq", "--run", "runs/fine", "-o", "train_vq.steps=5")
    assert "runs/tiny-vq/tokenizer.safetensors, with their discriminator" in out.stderr
    before, after = validations(trained / "runs" / "tiny-vq"), validations(trained / "runs" / "fine")
    assert after[0] == before[10]
    assert sorted(after) == [0, 5]
    state = torch.load(trained / "runs" / "fine" / "checkpoint.pt", weights_only=True)["stage"]["discriminator"]
    fresh = torch.load(trained / "runs" / "tiny-vq" / "checkpoint.pt", weights_only=True)["stage"]["discriminator"]
    # The tiny preset's discriminator starts at step 4: it has made a single step since.
    for name, weight in state["model"].items():
        assert (weight - fresh["model"][name]).abs().max() < 0.01
    manifest = Run(trained / "runs" / "fine", "vq").read()
    (change,) = manifest.history
    assert (change.step, change.branched_from, len(change.weights)) == (0, "runs/tiny-vq/tokenizer.safetensors", 1)
    # The same command resumes the run; with other weights it is refused.
    movq("train-vq", "--init", "runs/tiny-vq", "--run", "runs/fine", "-o", "train_vq.steps=6")
    other = movq("train-vq", "--init", "runs/fine", "--run", "runs/fine", "-o", "train_vq.steps=6", code=2).stderr
    assert "runs/fine did not begin with the weights in runs/fine/tokenizer.safetensors" in other


def test_fine_tuning_without_its_checkpoint_begins_with_the_same_weights_or_not_at_all(
    movq: Movq, trained: Path
) -> None:
    movq("train-vq", "--init", "runs/tiny-vq", "--run", "runs/fine", "-o", "train_vq.steps=5")
    fine = trained / "runs" / "fine"
    weights = (fine / "tokenizer.safetensors").read_bytes()
    for name in ("checkpoint.pt", "tokenizer.safetensors"):
        (fine / name).unlink()
    again = ["train-vq", "--preset", "runs/fine/settings.yaml", "--run", "runs/fine"]
    refused = movq(*again, code=2).stderr.splitlines()[-1]
    assert "runs/fine began with the weights in runs/tiny-vq/tokenizer.safetensors, and checkpoint.pt" in refused
    assert "Add --init runs/tiny-vq/tokenizer.safetensors to begin" in refused
    movq(*again, "--init", "runs/tiny-vq/tokenizer.safetensors")
    assert (fine / "tokenizer.safetensors").read_bytes() == weights


def test_without_a_discriminator_a_new_one_is_trained_before_its_loss_begins(
    movq: Movq, trained: Path, tiny_yaml: Path
) -> None:
    shutil.copy(trained / "runs" / "tiny-vq" / "tokenizer.safetensors", trained / "alone.safetensors")
    options = ["-o", "train_vq.steps=40", "-o", "train_vq.discriminator_start=0", "-o", "train_vq.validate_every=100"]
    out = movq("train-vq", "--preset", tiny_yaml, "--init", "alone.safetensors", "--run", "runs/fine", *options)
    assert "a new one is trained from step 0 on, and its loss begins at step 4" in out.stderr
    lines = [json.loads(line) for line in (trained / "runs" / "fine" / "log.jsonl").read_text().splitlines()]
    training = {line["step"]: line["training"] for line in lines if "training" in line}
    assert [step for step in training if "discriminator" not in training[step]] == []
    assert min(step for step in training if "generator" in training[step]) == 5


def test_with_encoder_and_codebook_frozen_the_decoder_alone_changes_and_priors_stay_valid(
    movq: Movq, trained: Path
) -> None:
    frozen = ["--init", "runs/tiny-vq", "--freeze", "encoder,codebook", "--run", "runs/decoder"]
    movq("train-vq", *frozen, "-o", "train_vq.base_learning_rate=1e-3")
    before, after = (load_file(trained / "runs" / name / "tokenizer.safetensors") for name in ("tiny-vq", "decoder"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    for name in ("tiny-vq", "decoder"):
        movq("reconstruct", "data", f"{name}-images", "--codes", f"{name}-codes", "--run", f"runs/{name}")
    maps = sorted((trained / "tiny-vq-codes").rglob("*.npy"))
    assert len(maps) == 60
    for path in maps:
        other = trained / "decoder-codes" / path.relative_to(trained / "tiny-vq-codes")
        assert np.array_equal(np.load(path), np.load(other))
    # A prior of the old codes draws with the new decoder, also with one that was fine-tuned twice.
    movq("sample", "new", "--n", "1", "--run", "runs/tiny-prior", "--tokenizer", "runs/decoder")
    again = ["--init", "runs/decoder", "--freeze", "encoder,codebook", "--run", "runs/again", "-o", "train_vq.steps=1"]
    movq("train-vq", *again)
    movq("sample", "again", "--n", "1", "--run", "runs/tiny-prior", "--tokenizer", "runs/again")
    # A tokenizer whose encoder was trained further is refused.
    movq("train-vq", "--init", "runs/tiny-vq", "--run", "runs/all", "-o", "train_vq.steps=1")
    refused = movq("sample", "x", "--n", "1", "--run", "runs/tiny-prior", "--tokenizer", "runs/all", code=2).stderr
    assert "models the codes of another tokenizer" in refused


@pytest.mark.parametrize("parts", ["encoder", "codebook", "decoder", "encoder,decoder"])
def test_any_parts_can_be_frozen(movq: Movq, trained: Path, parts: str) -> None:
    frozen = ["--init", "runs/tiny-vq", "--freeze", parts, "--run", "runs/part", "-o", "train_vq.steps=2"]
    movq("train-vq", *frozen, "-o", "train_vq.base_learning_rate=1e-3")
    before, after = (load_file(trained / "runs" / name / "tokenizer.safetensors") for name in ("tiny-vq", "part"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    modules = {
        "encoder": {"encoder", "quant_conv"},
        "codebook": {"quantize"},
        "decoder": {"decoder", "post_quant_conv"},
    }
    assert changed == set().union(*(names for part, names in modules.items() if part not in parts))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--init", "runs/none", "--run", "runs/b"], "no run folder at runs/none"),
        (["--init", "runs/tiny-vq"], "the new run has no name. Name its folder with --run"),
        (["--init", "runs/tiny-vq", "--from", "runs/tiny-vq", "--run", "runs/b"], "--init and --from both"),
        (
            ["--init", "runs/tiny-vq", "--run", "runs/b", "-o", "vq.codebook_size=32"],
            "vq.codebook_size is 32, but the weights in .* have 16. Omit it",
        ),
        (["--init", "runs/tiny-vq", "--run", "runs/b", "--freeze", "head"], "train_vq.freeze.*'encoder', 'codebook'"),
        (
            ["--init", "runs/tiny-vq", "--run", "runs/b", "--freeze", "encoder,codebook,decoder"],
            "freeze names all parts",
        ),
    ],
)
def test_fine_tuning_that_cannot_be_is_one_line_and_leaves_nothing(
    movq: Movq, trained: Path, arguments: list[str], words: str
) -> None:
    last = movq("train-vq", *arguments, code=2).stderr.splitlines()[-1]
    assert re.search(words, last), last
    assert not (trained / "runs" / "b").exists()
