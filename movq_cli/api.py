"""The Python face: what a notebook needs and no more.

from movq_cli import Prior, Tokenizer

tokenizer = Tokenizer.load("runs/ffhq-vq")
codes = tokenizer.encode(images)
images = tokenizer.decode(codes)
samples = Prior.load("runs/ffhq-prior").sample(n=4, steps=8, seed=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from movq_cli import checkpoints, devices, models, presets, runs
from movq_cli.checkpoints import PriorHeader
from movq_cli.errors import BadRequestError, did_you_mean
from movq_cli.files import sha256
from movq_cli.models.priors import CodePrior
from movq_cli.settings import SampleSettings


class Tokenizer(models.tokenizer.Tokenizer):
    """Stage 1: images [B, 3, H, W] in [-1, 1] to codes [B, h, w, c] with `encode`, and back with `decode`."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A trained tokenizer, in eval mode on the CPU.

        Args:
            path: A run folder or an exported `.safetensors` file.

        Raises:
            BadRequestError: There are no weights there, or they are damaged.
        """
        trained = checkpoints.load_tokenizer(runs.weights(Path(path), "vq"))
        with torch.device("meta"):
            empty = cls(trained.settings)
        empty.load_state_dict(trained.state_dict(), assign=True)
        return empty.eval()

    @classmethod
    def from_preset(cls, name: str, *overrides: str) -> Self:
        """An untrained tokenizer of a preset, with dotted overrides such as `vq.chunks=8`.

        Raises:
            BadRequestError: Unknown preset or setting.
        """
        return cls(presets.load(name, overrides).vq)


class Prior(nn.Module):
    """Stage 2 with the tokenizer that its codes belong to: samples images.

    Args:
        transformer: The prior.
        tokenizer: Decodes its codes.
        header: What the prior's weight file says of it.
    """

    def __init__(self, transformer: CodePrior, tokenizer: models.tokenizer.Tokenizer, header: PriorHeader) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.header = header

    @classmethod
    def load(cls, path: str | Path, tokenizer: str | Path | None = None) -> Self:
        """A trained prior, in eval mode on the CPU.

        Args:
            path: A run folder or an exported `.safetensors` file.
            tokenizer: A run folder or weight file; None = the one that lies beside the prior.

        Raises:
            BadRequestError: There are no weights there, they are damaged, or the tokenizer is not the one whose
                codes the prior models.
        """
        weights = runs.weights(Path(path), "prior")
        transformer, header = checkpoints.load_prior(weights)
        beside = weights.parent if tokenizer is None else Path(tokenizer)
        codes_from = runs.weights(beside, "vq")
        found = sha256(codes_from)
        if found != header.tokenizer:
            raise BadRequestError(
                f"{weights} models the codes of another tokenizer ({header.tokenizer[:12]}) than {codes_from} "
                f"({found[:12]})",
                "Name the tokenizer that it was trained with, or leave --tokenizer out.",
            )
        return cls(transformer, checkpoints.load_tokenizer(codes_from), header).eval()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; empty for an unconditional prior."""
        return self.header.classes

    def class_ids(self, wanted: Sequence[str | int]) -> list[int]:
        """The ids of classes given by name or number; all where none is given.

        Raises:
            BadRequestError: An unknown class, or any class at all where the prior is unconditional.
        """
        if wanted and not self.classes:
            raise BadRequestError("this prior is unconditional: it has no classes to choose from")
        return [self._class_id(name) for name in wanted] or list(range(len(self.classes)))

    def _class_id(self, name: str | int) -> int:
        if isinstance(name, str) and name in self.classes:  # a name wins: names may be numbers, in another order
            return self.classes.index(name)
        if str(name).isdecimal() and int(name) < len(self.classes):
            return int(name)
        raise BadRequestError(f"unknown class {str(name)!r}", did_you_mean(str(name), self.classes[:20]))

    @torch.inference_mode()
    def sample(
        self,
        n: int = 1,
        steps: int | None = None,
        seed: int = 0,
        classes: Sequence[str | int] | None = None,
        *,
        settings: SampleSettings | None = None,
        indices: Sequence[int] | None = None,
    ) -> Tensor:
        """Draw images; image i is a function of `seed + i` and its class alone.

        Args:
            n: How many.
            steps: Decoding steps; None = the preset's.
            seed: Of the first image; the next ones count up.
            classes: Names or numbers, taken in turn; None = all classes in turn. Unconditional priors take none.
            settings: Temperatures and guidance; None = the preset's.
            indices: Which images i to draw; None = 0 to n - 1.

        Returns:
            [n, 3, H, W] float32 in [-1, 1], on the model's device.

        Raises:
            BadRequestError: Unknown classes.
        """
        chosen = settings or self.header.sample
        if steps is not None:
            chosen = chosen.model_copy(update={"steps": steps})
        numbers = range(n) if indices is None else indices
        device = self.transformer.position.device
        ids = self.class_ids(classes or ())
        labels = torch.tensor([ids[i % len(ids)] for i in numbers], device=device) if ids else None
        with devices.autocast(device, "auto"):
            codes = self.transformer.decode([seed + i for i in numbers], labels, chosen)
            return self.tokenizer.decode(codes)
