"""What a weight file holds: the tokenizer among other models, its running averages, and its discriminator."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from movq_cli import checkpoints
from movq_cli.errors import BadRequestError
from movq_cli.interop import containers
from movq_cli.interop.containers import Contents
from movq_cli.interop.torch_files import Inert
from movq_cli.models.discriminator import PatchDiscriminator

Part = Literal["first_stage", "cond_stage"]
"""Part of a file that holds several models: the tokenizer of the images, or that of their condition."""

Weights = Literal["raw", "ema"]
"""The weights themselves, or their running averages."""

_NOT_THE_MODEL = re.compile(r"(loss|model_ema|ema_\w+)\.")
"""Names of tensors that belong to the training: losses with their networks, and averaged weights."""

_WRAPPERS = ("module.", "_orig_mod.")
"""Beginnings of all names that DistributedDataParallel and torch.compile add."""

_BATCH_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
"""Buffers of a discriminator's batch norms, which compute with the statistics of the batch."""

_DISCRIMINATOR = "loss.discriminator."


@dataclass(frozen=True)
class StateDicts:
    """The state dicts in a file, with the names that they have in it."""

    path: Path
    stage: Mapping[str, Any]
    """Everything of the chosen part; if the file has no parts, everything."""
    part: Part | None
    """The chosen part; None if the file has no parts."""
    outside: Mapping[str, Any]
    """Everything outside of the chosen part."""
    averaged: Mapping[str, Any]
    """Running averages of the weights, with the same names, if the file holds them as a state dict of their own."""
    discriminator: Mapping[str, Any]
    """The discriminator, if the file holds it as a state dict of its own."""
    arguments: Mapping[str, Any]
    """Arguments of the training, if the file holds them."""
    others: list[str]
    """Keys of everything else."""

    def model(self, weights: Weights, without: Collection[str]) -> dict[str, Any]:
        """Return the tensors of the tokenizer by their names.

        Args:
            weights: Whether to return the weights or their running averages.
            without: Names that are not needed.

        Raises:
            BadRequestError: There are no averages, or one is missing.
        """
        raw = {name: value for name, value in self.stage.items() if not _is_needless(name, without)}
        if weights == "raw":
            return raw
        if self.averaged:
            return {name: value for name, value in self.averaged.items() if name not in without}
        averaged = {name: self.stage[twin] for name in raw for twin in _twins(name) if twin in self.stage}
        if not averaged:
            raise BadRequestError(f"{self.path} holds no averaged weights of the tokenizer", "Omit --weights ema.")
        missing = [name for name in raw if name not in averaged]
        if missing:
            raise BadRequestError(f"{self.path} cannot be imported: the average of {missing[0]} is missing")
        return averaged

    def ignored(self, without: Collection[str]) -> list[str]:
        """Return what is not used, in words.

        Args:
            without: Names that the model does not need.
        """
        needless = [name for name in self.stage if _is_needless(name, without)]
        return [*_groups(self.outside), *_groups(needless), *self.others]

    def alternatives(self, weights: Weights) -> list[str]:
        """Return what else could be imported from the file, in words."""
        texts = []
        if weights == "raw" and (self.averaged or any(name.startswith(_AVERAGES) for name in self.stage)):
            texts.append("the file also holds averaged weights of the tokenizer: --weights ema imports them")
        if self.part == "first_stage" and any(name.startswith("cond_stage_model.encoder.") for name in self.outside):
            texts.append("the file also holds an encoder of its condition: --part cond_stage imports its tokenizer")
        return texts


_AVERAGES = ("ema_encoder.", "model_ema.encoder")


def find(contents: Contents, part: Part | None) -> StateDicts:
    """Find the state dicts in a file: the file itself, that of Lightning, or those of LlamaGen's training.

    Args:
        contents: Content of the file.
        part: Part to choose; None chooses the first stage of a file that has parts.

    Raises:
        BadRequestError: The file holds no tensors, or not this part.
    """
    values = contents.values
    key = next((key for key in ("state_dict", "model") if isinstance(values.get(key), Mapping)), None)
    if key is None and not any(isinstance(value, Tensor) for value in values.values()):
        keys = ", ".join(sorted(map(str, values))[:5]) or "none"
        raise BadRequestError(f"{contents.path} holds no tensors (its keys: {keys})", "Name a weight file.")
    is_llamagen = key == "model"
    used = {key, "ema", "discriminator"} if is_llamagen else {key}
    arguments = values.get("args")
    raw = _unwrapped(values if key is None else values[key])
    chosen: Part = part or "first_stage"
    beginning = f"{chosen}_model."
    stage = {name.removeprefix(beginning): value for name, value in raw.items() if name.startswith(beginning)}
    if part is not None and not stage:
        raise BadRequestError(
            f"{contents.path} holds no {beginning}*", "Omit --part if the file holds one tokenizer alone."
        )
    return StateDicts(
        path=contents.path,
        stage=stage or raw,
        part=chosen if stage else None,
        outside={name: value for name, value in raw.items() if stage and not name.startswith(beginning)},
        averaged=_unwrapped(_mapping(values.get("ema"))) if is_llamagen else {},
        discriminator=_unwrapped(_mapping(values.get("discriminator"))) if is_llamagen else {},
        arguments=_mapping(arguments.state) if isinstance(arguments, Inert) else {},
        others=[] if key is None else [str(name) for name in values if name not in used],
    )


def discriminator(found: StateDicts) -> tuple[dict[str, Tensor], tuple[int, int], str]:
    """Return the discriminator in a file, if it is VQGAN's.

    Returns:
        Its state dict, float32; the channels of its first layer and the number of its strided layers; and why it cannot
        be used. The state dict is empty if there is none or it cannot be used.
    """
    values = found.discriminator or {
        name.removeprefix(_DISCRIMINATOR): value
        for name, value in found.stage.items()
        if name.startswith(_DISCRIMINATOR)
    }
    if not values:
        return {}, (0, 0), ""
    try:
        tensors = {
            name: containers.usable(name, tensor, found.path)
            for name, tensor in values.items()
            if not name.endswith(_BATCH_STATISTICS)
        }
        # Between the first and the last convolution, each layer has a convolution, a norm and an activation.
        layers = (max(int(name.split(".")[1]) for name in tensors) - 2) // 3
        channels = int(tensors["main.0.weight"].shape[0])
        if {name: tensor.shape for name, tensor in tensors.items()} != checkpoints.shapes_of(
            lambda: PatchDiscriminator(channels, layers)
        ):
            raise ValueError("its shapes are others")
    except (BadRequestError, KeyError, ValueError, IndexError, RuntimeError):
        return {}, (0, 0), "the discriminator, which has another layout than VQGAN's, or is damaged"
    return tensors, (channels, layers), ""


def _is_needless(name: str, without: Collection[str]) -> bool:
    return bool(_NOT_THE_MODEL.match(name)) or name in without


def _twins(name: str) -> tuple[str, str]:
    """Return the names of a tensor's running average, as MoVQGAN and as latent-diffusion store it: without dots."""
    module, _, rest = name.partition(".")
    return f"ema_{module}.{rest.replace('.', '')}", f"model_ema.{name.replace('.', '')}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _unwrapped(values: Mapping[Any, Any]) -> Mapping[str, Any]:
    """Return the tensors of a state dict without the beginnings that wrappers of the model add to all names."""
    named = {str(name): value for name, value in values.items()}
    for beginning in (*_WRAPPERS, *_WRAPPERS):
        if named and all(name.startswith(beginning) for name in named):
            named = {name.removeprefix(beginning): value for name, value in named.items()}
    return named


def _groups(names: Iterable[str]) -> list[str]:
    """Return names in words, those with the same first part together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [group[0] if len(group) == 1 else f"{name}.* ({len(group)} tensors)" for name, group in groups.items()]
