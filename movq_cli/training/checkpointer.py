"""The files that a training run saves: its last checkpoint, the exported weights, and those of its best validation."""

from __future__ import annotations

from typing import Any

import torch

from movq_cli import agreement, checkpoints
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
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
        """Load the last checkpoint if there is one, and return the number of steps already done.

        Rank 0 decides whether there is one. Ranks of one machine read it from the disk; if there are several machines,
        of which perhaps only one has the run folder, rank 0 sends its state to all ranks.

        Raises:
            BadRequestError: The checkpoint is damaged, or of another run.
            FailureError: The ranks differ after it was loaded.
        """
        ranks = self.stage.ranks
        is_resumed = ranks.from_first(self.run.checkpoint.exists)
        state: dict[str, Any] | None = None
        if is_resumed and (ranks.is_first or ranks.is_one_machine):
            state = checkpoints.load_state(self.run.checkpoint, torch.device("cpu"), self._remedy)
        if not ranks.is_one_machine:
            state = agreement.broadcast_state(ranks, self._state(0) if state is None else state)
        step = 0 if state is None else self._restore(state)
        if is_resumed:
            console.log(f"resuming from step {step} in {self.run.folder}")
        self.require_same_state(step)
        return step

    def _restore(self, state: dict[str, Any]) -> int:
        """Restore all parts of the stage from a checkpoint's content, and return its step."""
        try:
            if state["run"] != self.manifest.started:
                raise ValueError("it belongs to another run")
            for name, part in self.stage.parts().items():
                part.load_state_dict(state["stage"][name])
            step, best = int(state["step"]), state["best"]
            update = {"best_step": best["step"], "best_score": best["score"]}
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"{self.run.checkpoint} is not a checkpoint of this run ({reason})"
            raise BadRequestError(message, self._remedy) from None
        self.manifest = self.manifest.model_copy(update=update)
        return step

    def _state(self, step: int) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        state = {name: part.state_dict() for name, part in self.stage.parts().items()}
        best = {"step": self.manifest.best_step, "score": self.manifest.best_score}
        return {"run": self.manifest.started, "step": step, "stage": state, "best": best}

    @property
    def _remedy(self) -> str:
        return f"Remove {self.run.folder} to train from the start."

    def require_same_state(self, step: int) -> None:
        """Check that all ranks have equal weights, optimizer states and averages after a number of steps.

        Raises:
            FailureError: They differ, so that the state of no rank can be trusted; no file has been changed.
        """
        agreement.require_same_state(
            self.stage.ranks,
            {name: part.state_dict() for name, part in self.stage.parts().items()},
            f"after step {step}",
            f"The last checkpoint in {self.run.folder} has not been changed: run the same command again to resume from "
            "it. If it happens again, check the memory and the GPUs of these machines.",
        )

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
        checkpoints.save_state(self.run.checkpoint, self._state(step))
        self.publish(step)

    def save_if_finite(self, step: int) -> bool:
        """Save unless a weight, an optimizer state or an average is not finite; return whether it was saved."""
        tensors = agreement.tensors_of([part.state_dict() for part in self.stage.parts().values()])
        is_finite = all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())
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
