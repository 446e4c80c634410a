"""Resuming from a file that is no checkpoint of the run: one line says so, and its remedy works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from movq_cli import checkpoints, runs
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training.checkpointer import Checkpointer
from tests.training.toy import ToyStage

QUIET = Console(quiet=True)
WEIGHT = {"model": {"weight": torch.zeros(1, 1)}}
BEST = {"step": None, "score": None}


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1],
        {"run": "2020-01-01", "step": 3, "stage": WEIGHT, "best": BEST},
        {"step": 3, "stage": {}, "best": BEST},
        {"step": 3, "stage": {"model": {"weight": torch.zeros(2, 2)}}, "best": BEST},
        {"step": "x", "stage": WEIGHT, "best": BEST},
        {"step": 3, "stage": WEIGHT},
        {"step": 3, "stage": WEIGHT, "best": None},
    ],
)
def test_a_foreign_checkpoint_is_refused_in_one_line_and_can_be_removed(
    tmp_path: Path, tiny: Preset, content: dict[str, object]
) -> None:
    run = Run(tmp_path, "vq")
    manifest = runs.start_or_resume(
        run, runs.new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=10, data="d")
    )
    own = {"run": manifest.started, **content} if isinstance(content, dict) else content
    checkpoints.save_state(run.checkpoint, own)
    with pytest.raises(BadRequestError, match=r"checkpoint\.pt is not a checkpoint of this run \(.+\)\. Remove "):
        Checkpointer(ToyStage(tiny.train_vq), run, manifest).resume(QUIET)
    shutil.rmtree(run.folder)
    manifest = runs.start_or_resume(
        run, runs.new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=10, data="d")
    )
    assert Checkpointer(ToyStage(tiny.train_vq), run, manifest).resume(QUIET) == 0
