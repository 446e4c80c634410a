"""Weight files and training states: they are written atomically, and reading them runs no code.

A weight file is a safetensors file whose metadata contain the settings of the model, so that a model can be built from
the file alone. A training state is a file that torch.save wrote, with tensors and plain values only; it is read with
`weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from movq_cli import digests
from movq_cli.devices import WithoutInitialization
from movq_cli.digests import NO_DIGEST, Header
from movq_cli.errors import BadRequestError, MovqError
from movq_cli.files import atomic_file, sha256
from movq_cli.models import priors
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.priors import CodePrior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.paths import require_utf8
from movq_cli.setting_types import Channels, Depth
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings, TokenizerSettings
from movq_cli.version import __version__

ModelT = TypeVar("ModelT", bound=nn.Module)
_WEIGHTS_REMEDY = "Remove it and run the training command of its run folder again, or copy it there again."

HeaderT = TypeVar("HeaderT", bound=Header)


class TokenizerHeader(Header):
    """The metadata of a tokenizer's weight file."""

    vq: TokenizerSettings
    same_codes: tuple[str, ...] = ()
    """SHA-256 of other weight files whose tokenizers give the same codes: their decoder alone was trained further."""
    version: str = __version__
    """Version of movq that wrote the file."""


class DiscriminatorHeader(Header):
    """The metadata of a discriminator's weight file."""

    channels: Channels
    """Channels of the first layer."""
    layers: Depth
    """Number of strided layers."""
    version: str = __version__
    """Version of movq that wrote the file."""


class PriorHeader(Header):
    """The metadata of a prior's weight file."""

    prior: PriorSettings
    shape: CodeShape
    sample: SampleSettings
    """Default settings of sampling."""
    classes: tuple[str, ...]
    """Class names; empty for an unconditional prior."""
    tokenizer: str
    """SHA-256 of the weight file of the tokenizer whose codes the prior models."""
    version: str = __version__
    """Version of movq that wrote the file."""


def save_weights(path: Path, model: nn.Module, header: Header) -> None:
    """Write a model's weights, with the header from which the model can be built.

    Raises:
        FailureError: The file cannot be written; an existing file is then unchanged.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # The metadata have a single entry, because safetensors writes several entries in a varying order, and files with
    # equal weights must have equal hashes.
    metadata = {"movq": header.model_copy(update={"digest": NO_DIGEST}).model_dump_json()}
    # The file is not written by safetensors itself, because only its owner could then read it.
    digests.write(path, save(tensors, metadata))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a weight file, in eval mode on the CPU.

    Raises:
        BadRequestError: The file is missing, damaged, or not a tokenizer that movq wrote.
    """
    tensors, text = _read_weights(path)
    header = _header(path, text, TokenizerHeader)
    return _with_weights(path, lambda: Tokenizer(header.vq), tensors)


def same_codes(path: Path) -> tuple[str, ...]:
    """Return the SHA-256 of the weight files whose codes a tokenizer gives: that of its own file, then those of others.

    Raises:
        BadRequestError: The file is missing, damaged, or not a tokenizer that movq wrote.
    """
    _, text = _read_weights(path, with_tensors=False)
    return (sha256(path), *_header(path, text, TokenizerHeader).same_codes)


def holds(path: Path, model: nn.Module) -> bool:
    """Return whether a weight file holds exactly the weights of a model.

    Raises:
        BadRequestError: The file is damaged.
    """
    if not path.is_file():
        return False
    tensors, state = _read_weights(path)[0], model.state_dict()
    return tensors.keys() == state.keys() and all(
        tensor.dtype == state[name].dtype and torch.equal(tensor, state[name].cpu()) for name, tensor in tensors.items()
    )


def load_prior(path: Path) -> tuple[CodePrior, PriorHeader]:
    """Load the prior of a weight file, in eval mode on the CPU, and the file's header.

    Raises:
        BadRequestError: The file is missing, damaged, or not a prior that movq wrote.
    """
    tensors, text = _read_weights(path)
    header = _header(path, text, PriorHeader)
    if header.prior.layers > len(tensors):  # without this, building the layers of a damaged file takes half a minute
        raise BadRequestError(f"{path} does not fit its own settings: {header.prior.layers} layers")
    return _with_weights(path, lambda: priors.build(header.prior, header.shape), tensors), header


def load_discriminator(path: Path) -> PatchDiscriminator:
    """Load the discriminator of a weight file on the CPU.

    Raises:
        BadRequestError: The file is missing, damaged, or not a discriminator that movq wrote.
    """
    tensors, text = _read_weights(path)
    header = _header(path, text, DiscriminatorHeader)
    return _with_weights(path, lambda: PatchDiscriminator(header.channels, header.layers), tensors)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state.

    Raises:
        FailureError: The file cannot be written; an existing file is then unchanged.
    """
    with atomic_file(path) as file:
        output = _Output(file)
        try:
            torch.save(state, cast(BinaryIO, output))
        except (RuntimeError, OSError):
            if output.error is None:
                raise
            raise output.error from None
        digests.append_to_zip(file)


class _Output:
    """The file of a training state, which stores the error of a failed write: torch's zip writer raises another one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write bytes to the file."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Do nothing; the file is flushed when it is complete."""


def load_state(path: Path, device: torch.device, remedy: str) -> dict[str, Any]:
    """Load a training state, with its tensors on `device`.

    Args:
        path: File of the state.
        device: Device of the tensors.
        remedy: Sentence for the error that says what makes the file again.

    Raises:
        BadRequestError: The file is damaged.
    """
    digests.check(path, remedy)
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception:
        # A damaged pickle can raise any exception. torch's text advises to load the file with weights_only=False, which
        # would run any code that is in it.
        raise BadRequestError(f"{path} is not a training state that this version of movq wrote", remedy) from None
    return state


def _read_weights(path: Path, *, with_tensors: bool = True) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a weight file, or none of them on request, and the text of its header."""
    require_utf8(path)
    if not path.is_file():
        raise BadRequestError(
            f"there are no weights at {path}", "Name a run folder or a .safetensors file that movq wrote."
        )
    has_digest = digests.check(path, _WEIGHTS_REMEDY, required=False)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("movq", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadRequestError(f"{path} is not a complete safetensors file: {error}", _WEIGHTS_REMEDY) from None
    if '"digest"' in text and not has_digest:
        raise BadRequestError(f"{path} is damaged: its digest cannot be read", _WEIGHTS_REMEDY)
    return tensors, text


def _header(path: Path, text: str, kind: type[HeaderT]) -> HeaderT:
    try:
        return kind.model_validate_json(text).model_copy(update={"digest": NO_DIGEST})
    except ValidationError:
        model = kind.__name__.removesuffix("Header").lower()
        raise BadRequestError(f"{path} is not a {model} that this version of movq wrote") from None


def _with_weights(path: Path, build: Callable[[], ModelT], tensors: dict[str, Tensor]) -> ModelT:
    """Build a model whose parameters are the tensors of a file, in eval mode.

    The model gets memory only after the shapes of its parameters, which follow from the settings in the file, have been
    compared with the tensors in the file: the settings can be those of a model of any size.
    """
    try:
        expected = shapes_of(build)
    except (MovqError, RuntimeError) as error:
        raise BadRequestError(f"the settings in {path} are those of no model: {error}") from None
    problem = _shape_problem(expected, {name: tensor.shape for name, tensor in tensors.items()})
    if problem is not None:
        raise BadRequestError(f"{path} does not fit its own settings: {problem}")
    model = build()
    model.load_state_dict(tensors)
    return model.eval()


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, torch.Size]:
    """Return the shapes of a model's tensors by name, without memory for its weights."""
    with torch.device("meta"), WithoutInitialization():
        return {name: tensor.shape for name, tensor in build().state_dict().items()}


def _shape_problem(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str | None:
    """Return the first difference between the shapes of a model and those in a file; None if there is none."""
    for name in sorted(expected.keys() | found.keys()):
        by_settings, in_file = expected.get(name), found.get(name)
        if by_settings != in_file:
            return f"{name} is {_describe(in_file)} in the file, and {_describe(by_settings)} by the settings"
    return None


def _describe(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))
