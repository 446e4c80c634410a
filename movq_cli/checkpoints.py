"""Weights and training states on disk: written whole or not at all, loaded without running code.

A weight file is a safetensors file whose metadata holds the settings that rebuild the model, so that one file is a
model. A training state is a torch.save file of tensors and plain values, read with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import atomic_path, atomic_write
from movq_cli.models import priors
from movq_cli.models.priors import CodePrior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings, Settings, TokenizerSettings
from movq_cli.version import __version__

ModelT = TypeVar("ModelT", bound=nn.Module)
HeaderT = TypeVar("HeaderT", bound=Settings)


class TokenizerHeader(Settings):
    """What a tokenizer's weight file says of itself."""

    vq: TokenizerSettings
    version: str = __version__
    """Of movq, that wrote it."""


class PriorHeader(Settings):
    """What a prior's weight file says of itself."""

    prior: PriorSettings
    shape: CodeShape
    sample: SampleSettings
    classes: tuple[str, ...]
    """Class names; empty for an unconditional prior."""
    tokenizer: str
    """SHA-256 of the tokenizer's weight file whose codes it models."""
    version: str = __version__
    """Of movq, that wrote it."""


def save_weights(path: Path, model: nn.Module, header: Settings) -> None:
    """Write a model's weights with the header that rebuilds it.

    Raises:
        FailureError: The file cannot be written; what stood there before still stands.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # One entry: safetensors writes several in an order that changes from call to call, and equal weights shall have
    # equal hashes.
    metadata = {"movq": header.model_dump_json()}
    # Through memory: written by the library itself, the file would be readable to its owner alone.
    atomic_write(path, save(tensors, metadata))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a weight file, in eval mode on the CPU.

    Raises:
        BadRequestError: The file is missing, damaged, or no tokenizer of ours.
    """
    tensors, text = _read_weights(path)
    header = _header(path, text, TokenizerHeader)
    return _filled(path, Tokenizer(header.vq), tensors)


def load_prior(path: Path) -> tuple[CodePrior, PriorHeader]:
    """The prior in a weight file, in eval mode on the CPU, and what the file says of it.

    Raises:
        BadRequestError: The file is missing, damaged, or no prior of ours.
    """
    tensors, text = _read_weights(path)
    header = _header(path, text, PriorHeader)
    return _filled(path, priors.build(header.prior, header.shape), tensors), header


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state.

    Raises:
        FailureError: The file cannot be written; what stood there before still stands.
    """
    with atomic_path(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from None  # the zip writer's form of a full disk


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """A training state, its tensors on `device`.

    Raises:
        FailureError: The file is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FailureError(f"{path} is damaged: {reason}", "Remove it to train from the start.") from None
    return state


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    if not path.is_file():
        raise BadRequestError(f"no weights at {path}", "Name a run folder or a .safetensors file that movq wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata.get("movq", "")  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadRequestError(f"{path} is not a whole safetensors file: {error}") from None


def _header(path: Path, text: str, kind: type[HeaderT]) -> HeaderT:
    try:
        return kind.model_validate_json(text)
    except ValidationError:
        what = kind.__name__.removesuffix("Header").lower()
        raise BadRequestError(f"{path} is not a {what} that this version of movq wrote") from None


def _filled(path: Path, model: ModelT, tensors: dict[str, Tensor]) -> ModelT:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise BadRequestError(f"{path} does not fit its own settings: {reason}") from None
    return model.eval()
