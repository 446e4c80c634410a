"""Two ranks in the training loop: a weight that differs stops the run, and only rank 0 needs the checkpoint."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from movq_cli import runs
from movq_cli.console import Console
from movq_cli.errors import FailureError
from movq_cli.ranks import Machine, Ranks
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training import loop
from tests.conftest import TINY, on_ranks
from tests.training.toy import ToyStage

QUIET = Console(quiet=True)


class DriftingStage(ToyStage):
    """Changes one bit of its weight at a step on rank 1."""

    drift_at: int | None = None

    def step(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        metrics = super().step(batch, step)
        if step == self.drift_at and self.ranks.rank == 1:
            self.model.weight.data.view(torch.int32).bitwise_xor_(1 << 12)
        return metrics


def train(ranks: Ranks, folder: Path, steps: int, drift_at: int | None = None) -> dict[str, Any]:
    """Train on two machines with folders of their own, and return the weight and the error."""
    os.chdir(folder / f"node{ranks.rank}")
    ranks = replace(ranks, machines=(Machine("left", "0"), Machine("right", "1")))
    tiny = Preset.model_validate(TINY)
    settings = tiny.train_vq.model_copy(update={"validate_every": 4, "checkpoint_every": 3})
    run, stage = Run(Path("run"), "vq"), DriftingStage(settings, ranks)
    stage.drift_at = drift_at
    manifest = ranks.from_first(
        lambda: runs.start_or_resume(
            run, runs.new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=steps, data="d")
        )
    )
    try:
        loop.train(stage, run, manifest, QUIET)
    except FailureError as error:
        return {"error": str(error), "done": stage.done}
    return {"weight": stage.model.weight.detach(), "done": stage.done}


def train_and_drift(ranks: Ranks, folder: Path) -> list[dict[str, Any]]:
    found = [train(ranks, folder, 100, drift_at=6)]
    checkpoint = Path("run/checkpoint.pt")
    found.append({"checkpoint": torch.load(checkpoint)["step"] if checkpoint.exists() else None})
    if ranks.rank == 1:  # Weights that a machine has from elsewhere do not matter.
        torch.save({"step": 99}, folder / "node1" / "checkpoint.pt")
    return [*found, train(ranks, folder, 9)]


def test_a_changed_bit_on_one_rank_stops_the_run_before_anything_is_written_and_the_run_can_be_resumed(
    tmp_path: Path,
) -> None:
    for node in (0, 1):
        (tmp_path / f"node{node}").mkdir()
    alone = ToyStage(Preset.model_validate(TINY).train_vq)
    for step in range(9):
        torch.manual_seed(loop.step_seed(0, step))
        alone.step(torch.tensor(float(step)), step)
    first, second = on_ranks(train_and_drift, tmp_path, tmp_path, world=2)
    for stopped, _, resumed in (first, second):
        assert stopped["done"] == 8  # the next validation
        assert stopped["error"].startswith(
            "after step 8 the weights or optimizer states of rank 1 on right differ from those of rank 0 on left"
        )
        assert "run the same command again to resume" in stopped["error"]
        assert torch.equal(resumed["weight"], alone.model.weight)
    assert (first[1]["checkpoint"], second[1]["checkpoint"]) == (6, None)
    assert not (tmp_path / "node1" / "run").exists()
