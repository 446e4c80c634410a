"""The weights from which a tokenizer is fine-tuned: its own, and those of its discriminator if there are any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from movq_cli import checkpoints, runs
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.runs import Run
from movq_cli.settings import TokenizerSettings
from movq_cli.training_settings import TrainVQSettings


@dataclass(frozen=True)
class InitialWeights:
    """A trained tokenizer, and the discriminator that was trained with it."""

    path: Path
    """The weight file of the tokenizer."""
    digests: tuple[str, ...]
    """SHA-256 of this file, and of those whose tokenizers give the same codes."""
    tokenizer: Tokenizer
    discriminator: PatchDiscriminator | None
    """None if it is not stored beside the tokenizer."""

    @property
    def settings(self) -> TokenizerSettings:
        """Settings of the tokenizer."""
        return self.tokenizer.settings

    def discriminator_of(self, train: TrainVQSettings) -> PatchDiscriminator | None:
        """Return the discriminator if there is one with the layout of these settings."""
        if self.discriminator is None:
            return None
        is_same = all(getattr(train, name) == value for name, value in self.discriminator.settings.items())
        return self.discriminator if is_same else None


def load(path: Path) -> InitialWeights:
    """Load the weights of a run folder, or of a weight file.

    Args:
        path: Run folder of a tokenizer, trained or imported, or its weight file. The discriminator is that of the
            folder in which the weight file is.

    Raises:
        BadRequestError: There are no such weights, or they are damaged.
    """
    weights = runs.find_weights(path, "vq", beside=(Run(path, "vq").discriminator.name,))
    tokenizer = checkpoints.load_tokenizer(weights)
    return InitialWeights(
        weights, checkpoints.same_codes(weights), tokenizer, _discriminator(Run(weights.parent, "vq"))
    )


def _discriminator(run: Run) -> PatchDiscriminator | None:
    """Return the discriminator of a run: that of an import, or that of the last checkpoint."""
    if run.discriminator.is_file():
        return checkpoints.load_discriminator(run.discriminator)
    if not (run.checkpoint.is_file() and run.manifest_file.is_file()):
        return None
    train = run.read().settings.train_vq
    remedy = f"Remove it, or resume {run.folder}: it writes another one."
    state = checkpoints.load_state(run.checkpoint, torch.device("cpu"), remedy).get("stage", {})
    if "discriminator" not in state:
        return None
    discriminator = PatchDiscriminator(**train.discriminator_layout)
    discriminator.load_state_dict(state["discriminator"]["model"])
    return discriminator
