"""The settings of a tokenizer from its tensors, and their comparison with what a config says about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from movq_cli.image_size import ImageSize
from movq_cli.interop.names import count
from movq_cli.settings import ModulationSettings, TokenizerSettings

Facts = dict[str, Any]
"""Facts about a tokenizer that follow from its tensors, by name."""

_MOST_LEVELS = 14
"""Largest number of levels, that of `TokenizerSettings.multipliers`."""


class UnknownLayoutError(ValueError):
    """The tensors are those of no tokenizer that movq can build; the text says why."""


def facts(tensors: Mapping[str, Tensor]) -> Facts:
    """Return what the names and shapes of tensors, which have our names, say about their tokenizer.

    Raises:
        UnknownLayoutError: A tensor is missing or has no possible shape, or the model has no codebook.
    """
    names = list(tensors)
    quantizer = _quantizer(tensors)
    levels = count(names, "encoder.down.{i}")
    if not 1 <= levels <= _MOST_LEVELS:
        raise UnknownLayoutError(f"its encoder has {levels} levels")
    first, last = _shape(tensors, "encoder.conv_in.weight", 4), _shape(tensors, "decoder.conv_out.weight", 4)
    widths = [_shape(tensors, f"encoder.down.{level}.block.0.conv2.weight", 4)[0] for level in range(levels)]
    entries, code_dim = _shape(tensors, f"quantize.{'embed' if quantizer == 'gumbel' else 'embedding'}.weight", 2)
    return {
        "in_channels": first[1],
        "out_channels": last[0],
        "channels": first[0],
        "widths": widths,
        "blocks": max(count(names, f"encoder.down.{level}.block.{{i}}") for level in range(levels)),
        "attention_levels": [level for level in range(levels) if _has(names, f"encoder.down.{level}.attn.")],
        "mid_attention": _has(names, "encoder.mid.attn_1."),
        "z_channels": _shape(tensors, "encoder.conv_out.weight", 4)[0],
        "embed_dim": _shape(tensors, "quant_conv.weight", 4)[0],
        "code_dim": code_dim,
        "codebook_size": entries,
        "quantizer": quantizer,
        "is_modulated": _has(names, "decoder.mid.block_1.norm1.conv_y."),
    }


def settings(known: Facts, tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> TokenizerSettings:
    """Return the settings of the tokenizer.

    Args:
        known: What the tensors say, from `facts`.
        tensors: The tensors, with our names.
        others: Settings that the tensors do not show, among them `resolution`.

    Raises:
        UnknownLayoutError: No tokenizer of movq has these tensors.
    """
    for side in ("in", "out"):
        if known[f"{side}_channels"] != 3:
            raise UnknownLayoutError(
                f"its images have {known[f'{side}_channels']} channels; a tokenizer of movq reads and writes 3"
            )
    channels, short_side = known["channels"], min(ImageSize.of(others["resolution"]))
    odd = [width for width in known["widths"] if width % channels]
    if odd:
        raise UnknownLayoutError(f"its width {odd[0]} is not a multiple of the {channels} channels of its first layer")
    try:
        return TokenizerSettings(
            **{
                "channels": channels,
                "multipliers": tuple(width // channels for width in known["widths"]),
                "attention_resolutions": tuple(short_side // 2**level for level in known["attention_levels"]),
                "chunks": max(1, known["embed_dim"] // known["code_dim"]),
                "initial_feature": "quantized",
                "modulation": _modulation(known, tensors),
                **{name: known[name] for name in _SAME_NAMES},
                **others,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise UnknownLayoutError(f"{name}: {message}" if name else message) from None


_SAME_NAMES = ("blocks", "mid_attention", "z_channels", "embed_dim", "codebook_size", "quantizer")
"""Facts that are settings of the same name."""


def has_kandinsky_modulation(settings: TokenizerSettings) -> bool:
    """Return whether the norms are modulated as in MoVQGAN and diffusers: all of them, by the quantized map."""
    every = ModulationSettings(levels=len(settings.multipliers), kernel_size=1, source="quantized", affine=True)
    return settings.modulation == every


def contradiction(known: Facts, claimed: Mapping[str, tuple[str, Any]]) -> str | None:
    """Return the first thing that a config says and the tensors contradict, as a text; None if there is none.

    Args:
        known: What the tensors say.
        claimed: What the config says: for each fact the key in the config, and its value.
    """
    for name, (key, value) in claimed.items():
        if known[name] != value:
            return f"{key} means {name} = {value}, but the tensors have {known[name]}"
    return None


def _quantizer(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the quantizer."""
    if "quantize.used" in tensors:
        raise UnknownLayoutError("its codes are remapped (quantize.used), so that they are not those of its codebook")
    if "quantize.proj.weight" in tensors or "quantize.embed.weight" in tensors:
        return "gumbel"
    if not _has(tensors, "quantize.") and _gives_mean_and_variance(tensors):
        raise UnknownLayoutError("it is a KL autoencoder, which has no codebook")
    return "vq"


def _gives_mean_and_variance(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the encoder has twice as many output channels as the decoder has input channels."""
    encoded, decoded = (_shape(tensors, f"{name}.weight", 4) for name in ("encoder.conv_out", "decoder.conv_in"))
    return encoded[0] == 2 * decoded[1]


def _modulation(known: Facts, tensors: Mapping[str, Tensor]) -> ModulationSettings | None:
    if not known["is_modulated"]:
        return None
    levels = len(known["widths"])
    modulated = [level for level in range(levels) if _has(tensors, f"decoder.up.{level}.block.0.norm1.conv_y.")]
    scale = _shape(tensors, "decoder.mid.block_1.norm1.conv_y.weight", 4)
    return ModulationSettings(
        levels=len(modulated),
        kernel_size=3 if scale[2] == 3 else 1,
        source="quantized" if scale[1] == known["embed_dim"] else "conv_in",
        affine="decoder.mid.block_1.norm1.norm_layer.weight" in tensors,
    )


def _shape(tensors: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Return the shape of a tensor that every tokenizer has."""
    if name not in tensors:
        raise UnknownLayoutError(f"{name} is missing")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise UnknownLayoutError(f"{name} is {list(shape)}, which has not {axes} axes of at least 1")
    return shape


def _has(names: Iterable[str], beginning: str) -> bool:
    return any(name.startswith(beginning) for name in names)
