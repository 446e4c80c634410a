"""The trackers that record a training beside its log: TensorBoard, Weights & Biases, trackio.

Each library is an extra and is imported only when it is used.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from movq_cli.errors import BadRequestError
from movq_cli.runs import Run
from movq_cli.training_settings import TrainSettings

_PICTURE = "validation/picture"
_PROJECT = "movq"
"""Project of the runs, unless the library's own environment variable (`WANDB_PROJECT`) names another one."""


class Tracker(ABC):
    """A library that records a training. Every method may raise an error, which must not end the training."""

    failure: ClassVar[type[Exception] | tuple[type[Exception], ...]] = Exception
    """Errors that mean that the library cannot record any more."""

    def __init__(self, target: str) -> None:
        self.target = target
        """What the tracker writes, as the subject of a warning."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics by name after a number of steps."""

    @abstractmethod
    def picture(self, path: Path, step: int) -> None:
        """Record a picture of the validation after a number of steps."""

    @abstractmethod
    def close(self) -> None:
        """Write what is still in memory, and end."""

    def flush(self) -> None:  # noqa: B027 - most libraries write by themselves
        """Write what is still in memory, so that it is not lost if the process is killed."""


class TensorBoard(Tracker):
    """TensorBoard's event files in the run folder.

    Args:
        run: Run folder.
        done: Number of steps that the run has done already.
    """

    failure = OSError

    def __init__(self, run: Run, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(f"{run.events} cannot be written")
        # A TensorBoard that has read the events of repeated steps forgets them by `purge_step`.
        self._writer = SummaryWriter(run.events, purge_step=done + 1 if done else None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics by name after a number of steps."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, path: Path, step: int) -> None:
        """Record a picture of the validation after a number of steps."""
        with Image.open(path) as picture:
            self._writer.add_image(_PICTURE, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        """Write what is still in memory, so that it is not lost if the process is killed."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is still in memory, and end."""
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, in the folder `wandb` of the run folder; `WANDB_MODE=offline` sends nothing.

    Args:
        run: Run folder.
        done: Number of steps that the run has done already.
    """

    def __init__(self, run: Run, done: int) -> None:
        import wandb

        super().__init__("wandb cannot record the run")
        manifest = run.read()
        with redirect_stdout(sys.stderr):
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=run.folder.resolve().name,
                dir=str(run.folder),
                # A resumed training goes on with its run, which is known by the time of its start.
                id=os.environ.get("WANDB_RUN_ID", _identifier(run, manifest.started)),
                resume="allow",
                config=manifest.settings.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        # wandb's own step may not fall, and that of a run that resumes does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics by name after a number of steps."""
        self._run.log({**values, "step": step})

    def picture(self, path: Path, step: int) -> None:
        """Record a picture of the validation after a number of steps."""
        import wandb

        self._run.log({_PICTURE: wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        """Write what is still in memory, and end."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


class Trackio(Tracker):
    """A run of trackio, which stores it on this machine (`TRACKIO_DIR`) unless its variables name a space.

    Args:
        run: Run folder.
        done: Number of steps that the run has done already.
    """

    def __init__(self, run: Run, done: int) -> None:
        import trackio

        super().__init__("trackio cannot record the run")
        manifest = run.read()
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
                name=_identifier(run, manifest.started),
                config=manifest.settings.model_dump(mode="json"),
                resume="allow",
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics by name after a number of steps."""
        with redirect_stdout(sys.stderr):
            self._run.log(dict(values), step=step)

    def picture(self, path: Path, step: int) -> None:
        """Record a picture of the validation after a number of steps."""
        import trackio

        with redirect_stdout(sys.stderr):
            self._run.log({_PICTURE: trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        """Write what is still in memory, and end."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


_TRACKERS: Mapping[str, tuple[Callable[[Run, int], Tracker], str]] = {
    "tensorboard": (TensorBoard, "TensorBoard"),
    "wandb": (WeightsAndBiases, "wandb"),
    "trackio": (Trackio, "trackio"),
}
"""The tracker of each setting, and the name of its library."""


def requested(settings: TrainSettings) -> list[str]:
    """Return the names of the trackers that the settings ask for.

    Raises:
        BadRequestError: A setting is true and its library is not installed.
    """
    names = []
    for name, (_, library) in _TRACKERS.items():
        setting, is_installed = getattr(settings, name), find_spec(name) is not None
        if setting and not is_installed:
            raise BadRequestError(
                f"{name}=true, but {library} is not installed", f"Install it: pip install 'movq[{name}]'."
            )
        if setting or (setting is None and is_installed):
            names.append(name)
    return names


def start(name: str, run: Run, done: int) -> Tracker:
    """Start the tracker of a setting.

    Args:
        name: Name of the setting.
        run: Run folder.
        done: Number of steps that the run has done already.

    Raises:
        BadRequestError: The library refuses, as without an account.
        OSError: TensorBoard's files cannot be written.
    """
    build = _TRACKERS[name][0]
    try:
        return build(run, done)
    except (OSError, BadRequestError):
        raise
    except Exception as error:  # Each library has errors of its own.
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "Run `wandb login`, or set WANDB_MODE=offline." if name == "wandb" else f"Or set {name}=false."
        raise BadRequestError(f"{name} does not start: {reason}", remedy) from None


def _identifier(run: Run, started: str) -> str:
    """Return a name of a run that is the same when it resumes, and different for another run of the same folder."""
    digits = "".join(character for character in started if character.isdigit())
    return f"{run.folder.resolve().name}-{digits[:14]}"
