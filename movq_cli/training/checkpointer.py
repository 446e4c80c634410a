"""The files that a training run saves: its last checkpoint, the exported weights, and those of its best validation."""

from __future__ import annotations

import torch
from torch import Tensor

from movq_cli import checkpoints
from movq_cli.console import Console
from movq_cli.runs import Run, RunManifest, now
from movq_cli.training.stage import Stage


class Checkpointer:
    """Writes a run's checkpoints and weights, and restores the last checkpoint.

    Only rank 0 writes files; every rank calls each method.

    Args:
        stage: Stage in training.
        run: Run folder that receives the files.
        manifest: Manifest of the run, as `runs.start_or_resume` returned it.
    """

    def __init__(self, stage: Stage, run: Run, manifest: RunManifest) -> None:
        self.stage = stage
        self.run = run
        self.manifest = manifest

    def resume(self, console: Console) -> int:
        """Load the last checkpoint if there is one, and return the number of steps already done."""
        if not self.run.checkpoint.exists():
            return 0
        remedy = f"Remove {self.run.folder} to train from the start."
        state = checkpoints.load_state(self.run.checkpoint, torch.device("cpu"), remedy)
        for name, part in self.stage.parts().items():
            part.load_state_dict(state["stage"][name])
        step = int(state["step"])
        best = state["best"]
        self.manifest = self.manifest.model_copy(update={"best_step": best["step"], "best_score": best["score"]})
        console.log(f"resuming from step {step} in {self.run.folder}")
        return step

    def save_best(self, step: int, score: float) -> None:
        """Write the best weights if no earlier validation had this score or a higher one."""
        if self.manifest.best_score is not None and score <= self.manifest.best_score:
            return
        self.manifest = self.manifest.model_copy(update={"best_step": step, "best_score": score})
        if self.stage.ranks.is_first:
            self.stage.export(self.run.best)

    def save(self, step: int) -> None:
        """Write the checkpoint, then the weights and the manifest."""
        if not self.stage.ranks.is_first:
            return
        state = {name: part.state_dict() for name, part in self.stage.parts().items()}
        best = {"step": self.manifest.best_step, "score": self.manifest.best_score}
        checkpoints.save_state(self.run.checkpoint, {"step": step, "stage": state, "best": best})
        self.publish(step)

    def save_if_finite(self, step: int) -> bool:
        """Save unless a weight, an optimizer state or an average is not finite; return whether it was saved."""
        is_finite = all(_is_finite(part.state_dict()) for part in self.stage.parts().values())
        if is_finite:
            self.save(step)
        return is_finite

    def publish(self, step: int) -> None:
        """Write the weights for inference, and the number of steps done and the status to the manifest."""
        if not self.stage.ranks.is_first:
            return
        self.stage.export(self.run.weights)
        is_finished = step >= self.manifest.steps
        status = "finished" if is_finished else "running"
        update = {"step": step, "status": status, "finished": now() if is_finished else None}
        self.run.write(self.manifest.model_copy(update=update))


def _is_finite(state: object) -> bool:
    """Return whether all floating-point values of a nested state are finite."""
    if isinstance(state, Tensor):
        return not state.is_floating_point() or bool(state.isfinite().all())
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return all(_is_finite(part) for part in parts)
