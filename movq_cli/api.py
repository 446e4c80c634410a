"""The Python interface: tokenizers and priors for notebooks and scripts.

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
from movq_cli.models.priors import CodePrior
from movq_cli.settings import SampleSettings


class Tokenizer(models.tokenizer.Tokenizer):
    """A tokenizer: `encode` maps images [B, 3, H, W] in [-1, 1] to codes [B, h, w, c], and `decode` maps them back."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a trained tokenizer, in eval mode on the CPU.

        Args:
            path: Run folder, or weight file (`.safetensors`).

        Raises:
            BadRequestError: There are no weights at the path, or they are damaged.
        """
        trained = checkpoints.load_tokenizer(runs.find_weights(Path(path), "vq"))
        with torch.device("meta"):
            empty = cls(trained.settings)
        empty.load_state_dict(trained.state_dict(), assign=True)
        return empty.eval()

    @classmethod
    def from_preset(cls, preset_name: str, *overrides: str) -> Self:
        """Create an untrained tokenizer.

        Args:
            preset_name: Name of a preset, or path of a preset file.
            overrides: Settings to change, such as `vq.chunks=8`.

        Raises:
            BadRequestError: The preset or a setting does not exist.
        """
        return cls(presets.load(preset_name, overrides).vq)


class Prior(nn.Module):
    """A prior with the tokenizer whose codes it models; it samples images.

    Args:
        transformer: Model of the codes.
        tokenizer: Tokenizer that decodes the sampled codes to images.
        header: Metadata of the prior's weight file.
    """

    def __init__(self, transformer: CodePrior, tokenizer: models.tokenizer.Tokenizer, header: PriorHeader) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.header = header

    @classmethod
    def load(cls, path: str | Path, tokenizer: str | Path | None = None) -> Self:
        """Load a trained prior, in eval mode on the CPU.

        Args:
            path: Run folder, or weight file (`.safetensors`).
            tokenizer: Run folder or weight file of the tokenizer; None uses the one in the prior's folder.

        Raises:
            BadRequestError: There are no weights at a path, they are damaged, or the tokenizer is not the one whose
                codes the prior models.
        """
        weights = runs.find_weights(Path(path), "prior")
        transformer, header = checkpoints.load_prior(weights)
        tokenizer_path = weights.parent if tokenizer is None else Path(tokenizer)
        tokenizer_weights = runs.find_weights(tokenizer_path, "vq")
        digests = checkpoints.same_codes(tokenizer_weights)
        if header.tokenizer not in digests:
            raise BadRequestError(
                f"{weights} models the codes of another tokenizer ({header.tokenizer[:12]}) than {tokenizer_weights} "
                f"({digests[0][:12]})",
                "Name the tokenizer with which it was trained, or omit --tokenizer.",
            )
        return cls(transformer, checkpoints.load_tokenizer(tokenizer_weights), header).eval()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty for an unconditional prior."""
        return self.header.classes

    def class_ids(self, classes: Sequence[str | int]) -> list[int]:
        """Return the ids of classes that are given by name or id; without any, the ids of all classes.

        Raises:
            BadRequestError: A class is unknown, or classes are given and the prior is unconditional.
        """
        if classes and not self.classes:
            raise BadRequestError("this prior is unconditional: it has no classes to choose from")
        return [self._class_id(name) for name in classes] or list(range(len(self.classes)))

    def _class_id(self, name: str | int) -> int:
        if isinstance(name, str) and name in self.classes:  # First, because names can be numbers in another order.
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
        """Sample images; the random numbers of image i depend only on `seed + i`.

        With another batch size or another device, an image differs by the rounding of floating-point sums: sometimes a
        pixel by one level, and very rarely a code.

        Args:
            n: Number of images to sample.
            steps: Number of decoding steps; None uses that of the settings.
            seed: Seed of the first image; image i has the seed `seed + i`.
            classes: Names or ids of classes, which the images take in turn; None uses all classes in turn. An
                unconditional prior takes none.
            settings: Settings of sampling, such as temperatures and guidance; None uses those of the prior's preset.
            indices: Indices i of the images to sample; None samples the images 0 to n - 1.

        Returns:
            Images [n, 3, H, W] float32 in [-1, 1], on the device of the model.

        Raises:
            BadRequestError: A class is unknown.
        """
        chosen = settings or self.header.sample
        if steps is not None:
            chosen = chosen.model_copy(update={"steps": steps})
        chosen_indices = range(n) if indices is None else indices
        device = self.transformer.position.device
        ids = self.class_ids(classes or ())
        labels = torch.tensor([ids[i % len(ids)] for i in chosen_indices], device=device) if ids else None
        with devices.autocast(device, "auto"):
            codes = self.transformer.decode([seed + i for i in chosen_indices], labels, chosen)
            return self.tokenizer.decode(codes)
