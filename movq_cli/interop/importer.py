"""Importing a tokenizer: from any file that people publish to settings and tensors of ours, exactly or not at all."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from movq_cli import checkpoints
from movq_cli.errors import BadRequestError, MovqError
from movq_cli.image_size import Resolution
from movq_cli.interop import architecture, configs, containers, families, state_dicts
from movq_cli.interop.architecture import UnknownLayoutError
from movq_cli.interop.family import Claims, Family
from movq_cli.interop.names import count
from movq_cli.interop.state_dicts import Part, StateDicts, Weights
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import TokenizerSettings

Tensors = dict[str, Tensor]

_RESOLUTION = 256
"""Side of the training images, pixels, if nothing says it: that of most public tokenizers."""


@dataclass(frozen=True)
class ImportOptions:
    """Options of the user for a file that is imported; None leaves the choice to the file."""

    config: Path | None = None
    """Config of the model; None uses the one beside the weights, if there is one."""
    part: Part | None = None
    """Part of a file that holds several models; None = the first stage."""
    weights: Weights = "raw"
    """The weights themselves, or their running averages."""
    image_range: Literal["-1,1", "0,1"] | None = None
    resolution: Resolution | None = None


@dataclass
class Imported:
    """An imported tokenizer, and what is known about it."""

    settings: TokenizerSettings
    tensors: Tensors
    """The state dict of the tokenizer, float32, by our names."""
    discriminator: Tensors
    """The state dict of the discriminator; empty if the file holds none that can be used."""
    discriminator_size: tuple[int, int]
    """Channels of the discriminator's first layer, and number of its strided layers."""
    family: str
    training: Mapping[str, Any]
    """Settings of the training of the family, where they differ from the defaults."""
    license: str
    sha256: str
    used: str
    """Description of the parts of the file that were used, in words."""
    ignored: list[str] = field(default_factory=list)
    """Descriptions of the parts of the file that were not used, in words."""
    assumed: list[str] = field(default_factory=list)
    """Assumptions where neither the tensors nor a config gave a value, in words."""
    notes: list[str] = field(default_factory=list)
    """Other parts of the file that could be imported, and notes for the user, in words."""


def import_tokenizer(source: Path, options: ImportOptions) -> Imported:
    """Read a public tokenizer.

    Args:
        source: Weight file or folder; see `containers.read`.
        options: What the user says about it.

    Raises:
        BadRequestError: The source is no weight file, could run code, or holds no tokenizer that movq reproduces
            exactly. The error names the tensor or the key.
    """
    contents = containers.read(source)
    found = state_dicts.find(contents, options.part)
    family = _family(found)
    chosen = found.model(options.weights, family.ignored)
    theirs = {name: containers.usable(name, tensor, found.path) for name, tensor in chosen.items()}
    config, values, claims = _claims(found, options)
    if claims.refused:
        raise BadRequestError(f"{config} describes a model that cannot be imported: {claims.refused}")
    try:
        levels = count(list(theirs), family.first_level)
        tensors = family.complete(_with_our_names(family, theirs, levels))
        known = architecture.facts(tensors)
        contradiction = architecture.contradiction(known, claims.facts)
        if contradiction is not None:
            raise BadRequestError(
                f"{config} contradicts {found.path}: {contradiction}", "Name the config of these weights with --config."
            )
        others, assumed = _other_settings(family, claims, options, config)
        settings = architecture.settings(known, tensors, others)
        _require_same_tensors(family, settings, tensors)
    except ValueError as error:
        raise BadRequestError(f"{found.path} cannot be imported: {error}") from None
    discriminator, size, unusable = state_dicts.discriminator(found)
    return Imported(
        settings=settings,
        tensors=tensors,
        discriminator=discriminator,
        discriminator_size=size,
        family=family.key,
        training=family.training,
        license=family.license([*found.stage, *found.outside], values),
        sha256=contents.sha256,
        used=_used(theirs, found, options, len(discriminator), config),
        ignored=found.ignored(family.ignored) + ([unusable] if unusable else []),
        assumed=assumed,
        notes=[*found.alternatives(options.weights), *([family.note] if family.note else [])],
    )


def _used(theirs: Tensors, found: StateDicts, options: ImportOptions, discriminator: int, config: Path | None) -> str:
    """Return what was used of a file, in words; `discriminator` is the number of tensors of the discriminator."""
    numbers = sum(tensor.numel() for tensor in theirs.values())
    kind = "averaged" if options.weights == "ema" else "raw"
    stage = f" of {found.part}_model" if found.part else ""
    text = f"{len(theirs)} tensors with {numbers:,} numbers ({kind} weights{stage})"
    if discriminator:
        text += f", the discriminator ({discriminator} tensors)"
    return f"{text}, {config}" if config else text


@cache
def all_families() -> tuple[Family, ...]:
    """Return the families, in the order of their modules' names."""
    modules = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return tuple(importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in modules)


def _family(found: StateDicts) -> Family:
    """Return the family that has the most of the names in a file.

    Raises:
        BadRequestError: No family has any of them.
    """
    matches = {family: sum(1 for name in found.stage if family.mark.match(name)) for family in all_families()}
    best = max(matches, key=lambda family: matches[family])
    if not matches[best]:
        names = ", ".join(sorted(found.stage)[:3])
        known = ", ".join(family.key for family in all_families())
        raise BadRequestError(
            f"{found.path} holds no tokenizer of a known family ({names} ...)", f"Known families: {known}."
        )
    return best


def _with_our_names(family: Family, theirs: Tensors, levels: int) -> Tensors:
    """Return the tensors by our names.

    Raises:
        UnknownLayoutError: A name is not one of the family, or two are the same tensor of ours.
    """
    tensors: Tensors = {}
    for name, tensor in theirs.items():
        ours = family.names.to_ours(name, levels)
        if ours is None or ours in tensors:
            raise UnknownLayoutError(f"{name} is not a tensor of a tokenizer of the family {family.key}")
        tensors[ours] = tensor
    return tensors


def _require_same_tensors(family: Family, settings: TokenizerSettings, tensors: Tensors) -> None:
    """Check that the tensors are exactly those of the tokenizer with these settings.

    Raises:
        UnknownLayoutError: A tensor is missing, not known, or has another shape; the text has the family's name of it.
    """
    try:
        expected = checkpoints.shapes_of(lambda: Tokenizer(settings))
    except (MovqError, RuntimeError) as error:
        raise UnknownLayoutError(str(error)) from None
    levels = len(settings.multipliers)
    for ours in sorted(expected.keys() | tensors.keys()):
        name = family.names.to_theirs(ours, levels) or ours
        if ours not in tensors:
            raise UnknownLayoutError(f"{name} is missing")
        shape = list(tensors[ours].shape)
        if ours not in expected:
            raise UnknownLayoutError(f"{name} {shape} is not known; a model like this one has no such tensor")
        if shape != list(expected[ours]):
            raise UnknownLayoutError(f"{name} is {shape}, but by the other tensors it is {list(expected[ours])}")


def _claims(found: StateDicts, options: ImportOptions) -> tuple[Path | None, Mapping[str, Any], Claims]:
    """Return the path and the content of the config, and what it says.

    Without a config, the arguments of the training in the file itself say it; without these, nothing does.

    Raises:
        BadRequestError: The config is none, or does not describe a tokenizer.
    """
    part = found.part or "first_stage"
    path = options.config or configs.find(found.path)
    if path is not None:
        config = configs.read(path)
        claims = _claims_of_any(config, part, path)
        if claims is not None:
            return path, config, claims
        if options.config is not None:
            raise BadRequestError(
                f"{path} describes no tokenizer of a known family", "Name another file with --config, or omit it."
            )
    claims = _claims_of_any(found.arguments, part, found.path) if found.arguments else None
    return (None, {}, Claims()) if claims is None else (found.path, found.arguments, claims)


def _claims_of_any(config: Mapping[str, Any], part: Part, path: Path) -> Claims | None:
    """Return what the first family that knows a config reads in it; None if none does."""
    try:
        claims = (family.claims(config, part) for family in all_families())
        return next((claim for claim in claims if claim is not None), None)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BadRequestError(
            f"{path} is not a complete config: {reason}", "Name another file with --config, or remove this one."
        ) from None


def _other_settings(
    family: Family, claims: Claims, options: ImportOptions, config: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that the tensors do not show, and a text for each that was assumed.

    The user's option counts first, then the config, then the family, then what is usual.
    """
    usual = {"resolution": _RESOLUTION, "image_range": "-1,1", "norm_groups": 32, "normalize_codes": False}
    chosen = {"resolution": options.resolution, "image_range": options.image_range}
    values: dict[str, Any] = {}
    assumed = []
    for name, default in usual.items():
        if chosen.get(name) is not None:
            values[name] = chosen[name]
        elif name in claims.settings:
            values[name] = claims.settings[name][1]
        else:
            values[name] = family.settings.get(name, default)
            reason = f"as all of the family {family.key}" if name in family.settings else "as usual"
            if name not in {"norm_groups", "normalize_codes"} or name in family.settings:
                assumed.append(f"{name} {values[name]} ({reason})")
    if "resolution" in claims.settings and options.resolution is None:
        key, value = claims.settings["resolution"]
        if key == "sample_size":
            assumed.append(f"resolution {value} (sample_size in {config}, which diffusers does not use)")
    if "image_range" in claims.settings and options.image_range is None:
        key, value = claims.settings["image_range"]
        assumed.append(f"image_range {value} ({key})")
    return values, assumed
