"""The files that a training run saves: its checkpoints, the exported weights, and those of its best validation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from movq_cli import agreement, checkpoints, runs
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.files import link_or_copy
from movq_cli.run_manifest import RunManifest
from movq_cli.runs import Run, now
from movq_cli.training.log import Metrics
from movq_cli.training.stage import Stage
from movq_cli.training_settings import TrainVQSettings


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
        self.validation_is_missing = False
        """Whether the validation after the step of the loaded checkpoint was stopped."""
        self._resumed_step: int | None = None
        """Step of the loaded checkpoint."""

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
        if ranks.is_first:
            self._settle_best()
        if is_resumed:
            console.log(f"resuming from step {step} in {self.run.folder}")
        elif self.manifest.step > 0:
            console.warn(
                f"{self.run.checkpoint} is missing: the run starts again from step 0, "
                f"though {self.manifest.step} steps were done"
            )
        self.require_same_state(step)
        return step

    def _restore(self, state: dict[str, Any]) -> int:
        """Restore all parts of the stage from a checkpoint's content, and return its step."""
        try:
            if state["run"] != self.manifest.started:
                raise ValueError("it belongs to another run")
            for name, part in self.stage.parts().items():
                # A part that the run did not have before, such as a discriminator, starts now.
                if name in state["stage"] or name not in self.stage.optional_parts:
                    part.load_state_dict(state["stage"][name])
            step, best = int(state["step"]), state["best"]
            update = {"best_step": best["step"], "best_by": best.get("by"), "best_score": best["score"]}
            update["validations_since_best"] = best.get("validations_since", 0)
            self.validation_is_missing = bool(state.get("validation_is_missing"))
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"{self.run.checkpoint} is not a checkpoint of this run ({reason})"
            raise BadRequestError(message, self._remedy) from None
        self.manifest = self.manifest.model_copy(update=update)
        self._resumed_step = step
        return step

    def _state(self, step: int) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        manifest = self.manifest
        return {
            "run": manifest.started,
            "step": step,
            "stage": {name: part.state_dict() for name, part in self.stage.parts().items()},
            "best": {
                "step": manifest.best_step,
                "by": manifest.best_by,
                "score": manifest.best_score,
                "validations_since": manifest.validations_since_best,
            },
            "validation_is_missing": self.validation_is_missing,
        }

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

    def save_best(self, step: int, metrics: Metrics) -> None:
        """Write the weights if these metrics have the stage's criterion, and no earlier value was as good.

        They become the best weights when the next checkpoint is written. A value that is not better is counted, unless
        the stage is not yet what it is to become, or the loaded checkpoint has counted it.
        """
        criterion, before = self.stage.criterion, self.manifest
        value = metrics.get(criterion.metric)
        if not isinstance(value, float) or not math.isfinite(value):
            return
        has_best = before.best_by == criterion.metric and before.best_score is not None
        if has_best and not criterion.is_better(value, before.best_score or 0.0):
            is_repeated = step == self._resumed_step and not self.validation_is_missing
            if step > self.stage.settled_after and not is_repeated:
                since = before.validations_since_best + 1
                self.manifest = before.model_copy(update={"validations_since_best": since})
            return
        update = {"best_step": step, "best_by": criterion.metric, "best_score": value, "validations_since_best": 0}
        self.manifest = before.model_copy(update=update)
        if self.stage.ranks.is_first:
            newer = self._next_best(step)
            self.stage.export(newer)
            self._settle_best(keeps=newer)

    @property
    def stops_early(self) -> bool:
        """Whether the run ends here, because its validations no longer improve."""
        return self.manifest.has_stopped_improving

    def _settle_best(self, *, keeps: Path | None = None) -> None:
        """Rename the better weights of which the checkpoint knows to the best ones, and remove others.

        After a kill, the run goes on from its checkpoint, and the best weights must not be of a later step.

        Args:
            keeps: Better weights that are not changed, because the next checkpoint will know of them.
        """
        best = self.manifest.best_step
        for path in self.run.folder.glob(f"{self.run.best.stem}.*.next"):
            if path == keeps:
                continue
            if best is not None and path == self._next_best(best):
                path.replace(self.run.best)
            else:
                path.unlink(missing_ok=True)

    def _next_best(self, step: int) -> Path:
        """Return the path of the weights of a step that are better, until a checkpoint knows of them."""
        return self.run.best.with_suffix(f".{step:08d}.next")

    def save(self, step: int) -> None:
        """Write the checkpoint, then the weights and the manifest; remove what exceeds the earlier checkpoints."""
        if not self.stage.ranks.is_first:
            return
        checkpoints.save_state(self.run.checkpoint, self._state(step))
        self._settle_best()
        self._keep(step)
        self.publish(step)

    def _keep(self, step: int) -> None:
        """Give the checkpoint a second name by its step if it is to stay, and remove the oldest of those that stay."""
        limit, milestones = self.stage.settings.keep_checkpoints, self.stage.milestones
        if limit or step in milestones:
            link_or_copy(self.run.checkpoint, self.run.kept_checkpoint(step))
        others = [kept for kept in self.run.kept_steps() if kept not in milestones]
        names = limit + 1 if limit else 0  # The last checkpoint has such a name too.
        for kept in others[: max(0, len(others) - names)]:
            self.run.kept_checkpoint(kept).unlink(missing_ok=True)

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
        is_complete = step >= self.manifest.steps
        is_finished = (is_complete or self.stops_early) and not self.validation_is_missing
        status = "finished" if is_finished else "running"
        update = {"step": step, "status": status, "finished": now() if is_finished else None}
        update["stopped_early"] = is_finished and not is_complete
        self.run.write(self.manifest.model_copy(update=update))


def branch(origin: Run, step: int | None, run: Run, manifest: RunManifest) -> RunManifest:
    """Start a run from a training state of another run.

    Args:
        origin: The other run.
        step: Number of steps that the state has done; None takes the last checkpoint.
        run: The new run, whose checkpoint and manifest are written.
        manifest: Manifest of the new run, as `runs.new_manifest` returned it.

    Returns:
        The manifest as it now is on disk.

    Raises:
        BadRequestError: The origin has no such checkpoint, or no run can go on from it.
    """
    before = origin.read()
    stored = {kept: origin.kept_checkpoint(kept) for kept in origin.kept_steps()}
    if origin.checkpoint.is_file():
        stored[before.step] = origin.checkpoint
    chosen = before.step if step is None else step
    if chosen not in stored:
        known = ", ".join(map(str, sorted(stored)))
        remedy = f"It has those of the steps {known}." if known else "Resume it, and it writes one."
        raise BadRequestError(f"{origin.folder} has no checkpoint of step {chosen}", remedy)
    after = runs.branch(origin, chosen, manifest)
    if after.steps <= chosen:
        raise BadRequestError(
            f"the run would end at step {after.steps}, but the state in {origin.folder} has done {chosen} steps",
            "Give it more steps: -o train_vq.steps or -o train_prior.steps counts those of the origin too.",
        )
    remedy = "Name another step of it (RUN@STEP)."
    state = checkpoints.load_state(stored[chosen], torch.device("cpu"), remedy)
    if state.get("run") != before.started or state.get("step") != chosen:
        raise BadRequestError(f"{stored[chosen]} is not the checkpoint of step {chosen} of this run", remedy)
    state["run"] = after.started
    state["best"] = {"step": None, "by": None, "score": None}
    if any(name in after.history[-1].settings for name in _DISCRIMINATOR):
        for part in ("discriminator", "lecam"):
            state["stage"].pop(part, None)  # It starts anew.
    checkpoints.save_state(run.checkpoint, state)
    runs.write(run, after)
    return after


_DISCRIMINATOR = {f"train_vq.discriminator_{name}" for name in TrainVQSettings().discriminator_layout}
"""Settings that decide the shapes of the discriminator's weights."""
