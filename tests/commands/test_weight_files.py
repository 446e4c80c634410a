"""Weight files in place of run folders, the best weights in place of the last ones, and the place of cached codes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from movq_cli.commands import train_prior
from movq_cli.commands.training import TrainRequest
from movq_cli.files import sha256
from movq_cli.runs import Run
from tests.conftest import Movq

SHORT = ["-o", "train_prior.steps=2"]


@pytest.mark.slow
def test_a_prior_is_trained_on_a_weight_file_and_its_codes_are_where_they_are_asked_for(
    movq: Movq, trained: Path, tiny_yaml: Path
) -> None:
    alone = trained / "elsewhere" / "mine.safetensors"
    alone.parent.mkdir()
    shutil.copy(trained / "runs" / "tiny-vq" / "tokenizer-best.safetensors", alone)
    train = ["train-prior", "--preset", tiny_yaml, *SHORT]
    movq(*train, "--tokenizer", "elsewhere/mine.safetensors", "--run", "runs/a", "--codes", "codes")
    assert [path.name for path in alone.parent.iterdir()] == ["mine.safetensors"]
    assert len(list((trained / "codes").glob("*/codes.npy"))) == 2
    assert Run(trained / "runs" / "a", "prior").read().tokenizer == sha256(alone)
    movq("sample", "a", "--n", "1", "--run", "runs/a")
    # The same weights as the best ones of their run.
    movq(*train, "--tokenizer", "runs/tiny-vq", "--weights-of", "best", "--run", "runs/b")
    assert Run(trained / "runs" / "b", "prior").read().tokenizer == sha256(alone)


@pytest.mark.slow
def test_the_best_weights_are_chosen_in_every_command(movq: Movq, trained: Path) -> None:
    best = ["--weights-of", "best"]
    movq("sample", "new", "--n", "1", "--run", "runs/tiny-prior", *best)
    settings = json.loads((trained / "new" / "manifest.json").read_text())["settings"]
    assert settings["prior"] == sha256(trained / "runs" / "tiny-prior" / "prior-best.safetensors")
    assert "tiny-vq/tokenizer-best.safetensors" in movq("reconstruct", "data", "back", *best).stderr
    assert "prior-best" in movq("reconstruct", "data", "filled", "--mask-ratio", "0.5", *best).stderr
    measured = json.loads(movq("evaluate", "--codebook", "data", "--json", *best).stdout)
    assert "tokenizer-best" in json.dumps(measured)
    refused = movq("sample", "x", "--run", "runs/tiny-prior/prior.safetensors", *best, code=2).stderr
    assert "is a weight file already. Omit --weights-of, or name the run folder" in refused
    (trained / "runs" / "tiny-prior" / "prior-best.safetensors").unlink()
    assert "has no prior-best.safetensors" in movq("sample", "x", "--run", "runs/tiny-prior", *best, code=2).stderr


@pytest.mark.parametrize(("is_writable", "folder"), [(True, "tokenizer"), (False, "new")])
def test_the_codes_of_a_read_only_tokenizer_are_in_the_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_writable: bool, folder: str
) -> None:
    class Context:
        request = TrainRequest("tiny")
        run = Run(tmp_path / "new", "prior")

    monkeypatch.setattr(os, "access", lambda path, mode: is_writable)
    caches = train_prior._code_caches(Context(), tmp_path / "tokenizer" / "tokenizer.safetensors")  # type: ignore[arg-type]
    assert caches == tmp_path / folder / "tokens"
