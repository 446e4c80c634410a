"""What the messages about a run's lost or damaged files advise, performed: it gives the files that were there."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import Movq

pytestmark = pytest.mark.slow


def test_a_finished_run_that_has_lost_its_weights_gets_them_back_from_its_checkpoint(movq: Movq, trained: Path) -> None:
    weights = trained / "runs" / "tiny-vq" / "tokenizer.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    refused = movq("reconstruct", "data", "back", "--run", "runs/tiny-vq", code=2).stderr
    assert "runs/tiny-vq has lost its tokenizer.safetensors (step 10 of 10)" in refused
    (command,) = [line.split("Resume it: movq ")[1] for line in refused.splitlines() if "Resume it" in line]
    movq(*shlex.split(command))
    assert weights.read_bytes() == content
    movq("reconstruct", "data", "back", "--run", "runs/tiny-vq")


def test_damaged_weights_are_made_again_after_they_are_removed(movq: Movq, trained: Path, tiny_yaml: Path) -> None:
    weights = trained / "runs" / "tiny-prior" / "prior.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused = movq("sample", "out", "--n", "1", "--run", "runs/tiny-prior", code=2).stderr
    assert (
        "prior.safetensors is damaged: its content does not fit its digest. Remove it and run the training" in refused
    )
    weights.unlink()
    movq("train-prior", "--preset", tiny_yaml)
    assert weights.read_bytes() == content


def test_the_checkpoint_of_another_run_is_refused_and_the_remedy_works(
    movq: Movq, trained: Path, tiny_yaml: Path
) -> None:
    run = trained / "runs" / "tiny-vq"
    movq("train-vq", "--preset", tiny_yaml, "--run", "runs/other")
    shutil.copy(trained / "runs" / "other" / "checkpoint.pt", run / "checkpoint.pt")
    longer = ["train-vq", "--preset", tiny_yaml, "-o", "train_vq.steps=11"]
    refused = movq(*longer, code=2).stderr
    assert "checkpoint.pt is not a checkpoint of this run (it belongs to another run). Remove runs/tiny-vq" in refused
    shutil.rmtree(run)
    movq(*longer)


def test_a_damaged_code_cache_is_refused_and_encoded_anew(movq: Movq, trained: Path, tiny_yaml: Path) -> None:
    (codes,) = (trained / "runs" / "tiny-vq" / "tokens").glob("*-train/codes.npy")
    content = codes.read_bytes()
    codes.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = ["train-prior", "--preset", tiny_yaml, "--run", "runs/again"]
    assert "codes.npy is damaged" in movq(*again, code=2).stderr
    shutil.rmtree(codes.parent)
    movq(*again)
    assert codes.read_bytes() == content
