"""The Python interface: tokenizers and priors for notebooks and scripts.

from movq_cli import Prior, Tokenizer

tokenizer = Tokenizer.load("runs/ffhq-vq")
codes = tokenizer.encode(images)
images = tokenizer.decode(codes)
samples = Prior.load("runs/ffhq-prior").sample(n=4, steps=8, seed=0)
tokenizer.push_to_hub("owner/name")
the_same = Tokenizer.load("hf://owner/name")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import torch
from torch import Tensor, nn

from movq_cli import checkpoints, devices, models, presets, runs
from movq_cli.checkpoints import PriorHeader, TokenizerHeader
from movq_cli.digests import Header
from movq_cli.errors import BadRequestError, did_you_mean
from movq_cli.interop import hub, model_card
from movq_cli.models.priors import CodePrior
from movq_cli.settings import SampleSettings
from movq_cli.version import __version__

_MADE = f"Uploaded by movq {__version__}."

_METADATA = """---
library_name: movq
---

"""
"""Beginning of a model card on the Hugging Face hub, which shows a warning for one without it."""

_USE_OF_TOKENIZER = """```python
from movq_cli import Tokenizer

tokenizer = Tokenizer.load("hf://{name}")
```

`movq reconstruct IMAGES OUT --run hf://{name} --metrics` writes reconstructions and measures them."""

_USE_OF_PRIOR = """```python
from movq_cli import Prior

samples = Prior.load("hf://{name}").sample(n=4)
```

`movq sample OUT --run hf://{name}` writes samples into a folder."""


class Tokenizer(models.tokenizer.Tokenizer):
    """A tokenizer: `encode` maps images [B, 3, H, W] in [-1, 1] to codes [B, h, w, c], and `decode` maps them back."""

    weight_file: Path | None = None
    """File from which the weights were loaded; None if they were not loaded."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a trained tokenizer, in eval mode on the CPU.

        Args:
            path: Run folder, weight file (`.safetensors`), or address on the Hugging Face hub
                (`hf://owner/name[@revision][/path]`).

        Raises:
            BadRequestError: There are no weights at the path, or they are damaged.
            FailureError: The hub cannot be reached.
        """
        weights = runs.find_weights(Path(path), "vq")
        trained = checkpoints.load_tokenizer(weights)
        with torch.device("meta"):
            empty = cls(trained.settings)
        empty.load_state_dict(trained.state_dict(), assign=True)
        empty.weight_file = weights
        return empty.eval()

    def push_to_hub(self, repository: str, *, private: bool | None = None) -> str:
        """Upload the weight file, with a model card, to the Hugging Face hub.

        Args:
            repository: Owner and name, `owner/name`; the repository is created if it does not exist.
            private: Whether a new repository is private; None leaves it to the owner's settings.

        Returns:
            The web address of the commit.

        Raises:
            BadRequestError: The name is none, or the account may not write to the repository.
            FailureError: The upload fails.
        """
        use = _USE_OF_TOKENIZER.replace("{name}", repository)
        card = model_card.of_tokenizer(self, self.weight_file, repository, _MADE, use)
        with TemporaryDirectory(prefix="movq-") as folder:
            new = Path(folder) / runs.WEIGHTS["vq"]
            weights = _weight_file(self, TokenizerHeader(vq=self.settings), self.weight_file, new)
            return _upload(repository, {new.name: weights}, card, private=private)

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

    weight_file: Path | None = None
    """File from which the weights of the transformer were loaded; None if they were not loaded."""
    tokenizer_file: Path | None = None
    """File from which the weights of the tokenizer were loaded; None if they were not loaded."""

    def __init__(self, transformer: CodePrior, tokenizer: models.tokenizer.Tokenizer, header: PriorHeader) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.header = header

    @classmethod
    def load(cls, path: str | Path, tokenizer: str | Path | None = None) -> Self:
        """Load a trained prior, in eval mode on the CPU.

        Args:
            path: Run folder, weight file (`.safetensors`), or address on the Hugging Face hub
                (`hf://owner/name[@revision][/path]`).
            tokenizer: Run folder, weight file or address of the tokenizer; None uses the one in the prior's folder.

        Raises:
            BadRequestError: There are no weights at a path, they are damaged, or the tokenizer is not the one whose
                codes the prior models.
        """
        weights = runs.find_weights(Path(path), "prior")
        transformer, header = checkpoints.load_prior(weights)
        tokenizer_path = weights.parent if tokenizer is None else Path(tokenizer)
        tokenizer_weights = runs.find_weights(tokenizer_path, "vq")
        _require_tokenizer(header, weights, tokenizer_weights)
        prior = cls(transformer, checkpoints.load_tokenizer(tokenizer_weights), header)
        prior.weight_file, prior.tokenizer_file = weights, tokenizer_weights
        return prior.eval()

    def push_to_hub(self, repository: str, *, private: bool | None = None) -> str:
        """Upload the weight files of the prior and of its tokenizer, with a model card, to the Hugging Face hub.

        Args:
            repository: Owner and name, `owner/name`; the repository is created if it does not exist.
            private: Whether a new repository is private; None leaves it to the owner's settings.

        Returns:
            The web address of the commit.

        Raises:
            BadRequestError: The name is none, the account may not write to the repository, or the tokenizer is not the
                one whose codes the prior models.
            FailureError: The upload fails.
        """
        use = _USE_OF_PRIOR.replace("{name}", repository)
        card = model_card.of_prior(
            self.transformer, self.header, self.tokenizer, self.weight_file, repository, _MADE, use
        )
        with TemporaryDirectory(prefix="movq-") as folder:
            new, new_tokenizer = (Path(folder) / runs.WEIGHTS[kind] for kind in ("prior", "vq"))
            header = TokenizerHeader(vq=self.tokenizer.settings)
            tokenizer = _weight_file(self.tokenizer, header, self.tokenizer_file, new_tokenizer)
            _require_tokenizer(self.header, new, tokenizer)
            weights = _weight_file(self.transformer, self.header, self.weight_file, new)
            return _upload(repository, {new.name: weights, new_tokenizer.name: tokenizer}, card, private=private)

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
        raise BadRequestError(f"unknown class {str(name)!r}", did_you_mean(str(name), self.classes))

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


def _upload(repository: str, weights: Mapping[str, Path], card: str, *, private: bool | None) -> str:
    """Upload weight files, by their names in the repository, with a model card; see `hub.upload`."""
    return hub.upload(repository, {**weights, "README.md": (_METADATA + card).encode()}, private=private)


def _weight_file(model: nn.Module, header: Header, loaded: Path | None, new: Path) -> Path:
    """Return a file with the weights of a model: the one from which they were loaded, else a new one.

    Priors refer to the SHA-256 of their tokenizer's file, which a new file with the same weights need not have.

    Args:
        model: The model.
        header: Header of a new file.
        loaded: File from which the weights were loaded; they may have changed since. None = they were not loaded.
        new: Path of a new file.
    """
    if loaded is not None and checkpoints.holds(loaded, model):
        return loaded
    checkpoints.save_weights(new, model, header)
    return new


def _require_tokenizer(header: PriorHeader, weights: Path, tokenizer: Path) -> None:
    """Check that a prior models the codes of a tokenizer; both are named by their weight files.

    Raises:
        BadRequestError: It models those of another one.
    """
    digests = checkpoints.same_codes(tokenizer)
    if header.tokenizer not in digests:
        raise BadRequestError(
            f"{weights} models the codes of another tokenizer ({header.tokenizer[:12]}) than {tokenizer} "
            f"({digests[0][:12]})",
            "Name the tokenizer with which it was trained, or omit --tokenizer.",
        )
