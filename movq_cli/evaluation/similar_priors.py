"""The results of earlier priors on similar tokenizers: how far their loss is below the unigram entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from movq_cli.errors import BadRequestError
from movq_cli.run_history import RunHistory
from movq_cli.settings import TokenizerSettings


@dataclass(frozen=True)
class PriorResult:
    """The validation of a prior that had the lowest loss."""

    run: str
    """Path of the run folder."""
    mode: str
    """Mode of the prior."""
    same_tokenizer: bool
    """Whether it models the codes of this very tokenizer; otherwise those of one with codes of the same shape."""
    step: int
    """Number of steps done."""
    loss: float
    """Validation loss, nats a predicted code."""
    unigram_entropy: float
    """Entropy of the codes' frequencies in each chunk, nats: the loss of a prior that knows nothing else."""

    @property
    def gain(self) -> float:
        """How far the loss is below the unigram entropy, nats."""
        return self.unigram_entropy - self.loss

    def describe(self) -> dict[str, Any]:
        """Return the entry of a protocol."""
        return {**asdict(self), "gain": self.gain}


def find(root: Path, settings: TokenizerSettings, tokenizer: str) -> list[PriorResult]:
    """Return the results of the priors on tokenizers whose codes have the same shape, the largest gain first.

    Args:
        root: Folder of run folders; what is not a readable run in it is passed over.
        settings: Settings of the tokenizer.
        tokenizer: SHA-256 of its weight file.
    """
    found = []
    for file in sorted(root.glob("*/run.json")):
        try:
            history = RunHistory.read(file.parent)
        except (BadRequestError, OSError):
            continue
        if history.manifest.kind == "prior" and _shape(history.manifest.settings.vq) == _shape(settings):
            found += list(_best(history, tokenizer))
    return sorted(found, key=lambda result: (not result.same_tokenizer, -result.gain))


def _shape(settings: TokenizerSettings) -> tuple[object, ...]:
    return settings.image_size, settings.factor, settings.chunks, settings.codebook_size


def _best(history: RunHistory, tokenizer: str) -> Iterator[PriorResult]:
    """Yield the validation with the lowest loss, if there is one."""
    entropies = dict(history.series("unigram_entropy", "validation"))
    losses = [(loss, step) for step, loss in history.series("loss", "validation") if step in entropies]
    if not losses:
        return
    loss, step = min(losses)
    if math.isfinite(loss):
        manifest = history.manifest
        yield PriorResult(
            str(history.run.folder),
            manifest.settings.prior.mode,
            manifest.tokenizer == tokenizer,
            step,
            loss,
            entropies[step],
        )
