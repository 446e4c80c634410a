"""Exporting a tokenizer to the names, the config and the files of another project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save
from torch import Tensor

from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import atomic_write
from movq_cli.image_size import ImageSize
from movq_cli.interop.families.compvis import FAMILY as COMPVIS
from movq_cli.interop.families.diffusers import FAMILY as DIFFUSERS
from movq_cli.interop.family import Family
from movq_cli.interop.importer import ImportOptions, import_tokenizer
from movq_cli.models.quantizers.vector import VectorQuantizer
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import TokenizerSettings

_POSITIONS = 16
"""Largest side of the compared pictures in code positions; more would take long where attention is at a fine level."""

_DIFFERENCE = 1e-4
"""Largest difference of a pixel, in [-1, 1], between the tokenizer and what was exported and read again."""


def export_compvis(model: Tokenizer, folder: Path) -> list[str]:
    """Write `model.ckpt` and `config.yaml`, for the classes of taming, latent-diffusion and MoVQGAN.

    Args:
        model: Tokenizer in eval mode on the CPU.
        folder: Folder for the files.

    Returns:
        What differs from the tokenizer, in words.

    Raises:
        BadRequestError: The format cannot hold a setting of the tokenizer.
    """
    tensors, config, notes = _converted(model, COMPVIS)
    with (folder / "model.ckpt").open("wb") as file:
        torch.save({"state_dict": tensors}, file)
    atomic_write(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    if model.settings.image_range != "-1,1":
        notes.append(f"images are in [{model.settings.image_range}], which neither the class nor the config says")
    return notes


def export_diffusers(model: Tokenizer, folder: Path) -> list[str]:
    """Write the folder from which diffusers' VQModel is loaded; see `export_compvis`."""
    tensors, config, notes = _converted(model, DIFFUSERS)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    atomic_write(folder / "diffusion_pytorch_model.safetensors", data)
    atomic_write(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    if model.settings.image_range != "-1,1":
        notes.append("images are in [0,1]: use VaeImageProcessor(do_normalize=False), as aMUSEd does")
    return notes


def verify(model: Tokenizer, folder: Path) -> float:
    """Import what was exported, and compare codes and reconstructions of random pictures.

    Args:
        model: Tokenizer that was exported.
        folder: Folder with the exported files.

    Returns:
        The largest difference of a pixel in [-1, 1].

    Raises:
        FailureError: What is read again does not compute the same.
    """
    settings = model.settings
    options = ImportOptions(image_range=settings.image_range, resolution=settings.resolution)
    imported = import_tokenizer(folder, options)
    again = Tokenizer(imported.settings).eval()
    again.load_state_dict(imported.tensors)
    pictures = example_pictures(settings)
    return require_same(model.encode(pictures), again.encode(pictures), model, again.decode, folder)


def example_pictures(settings: TokenizerSettings, size: ImageSize | None = None) -> Tensor:
    """Return smooth random pictures [2, 3, H, W] in [-1, 1], always the same.

    Args:
        settings: Settings of the tokenizer.
        size: Size of the pictures; None = that of the training images, but at most 16 x 16 code positions.
    """
    height, width = size or (min(side, _POSITIONS * settings.factor) for side in settings.image_size)
    noise = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=False).clamp(-1, 1)


def require_same(codes: Tensor, again: Tensor, model: Tokenizer, decode: Any, folder: Path) -> float:  # noqa: ANN401
    """Return the largest difference of a pixel between two decoders of the same codes, and check all of it.

    Args:
        codes: Codes of the tokenizer, [B, h, w, c].
        again: Codes of the exported one, of the same pictures.
        model: The tokenizer.
        decode: Function of the exported one from codes to images.
        folder: Folder with the exported files, for the error.

    Raises:
        FailureError: A code differs, or a pixel by more than rounding explains.
    """
    difference = float((model.decode(codes) - decode(codes)).abs().max())
    if not torch.equal(codes, again) or not difference <= _DIFFERENCE:
        share = float((codes != again).double().mean())
        raise FailureError(
            f"what was exported computes something else ({share:.1%} of the codes, pixels by {difference:.1e})"
        )
    return difference


def _converted(model: Tokenizer, family: Family) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Return the tensors by the family's names, its config, and what differs from the tokenizer, in words.

    Raises:
        BadRequestError: The family cannot have a setting of the tokenizer.
    """
    settings, notes = model.settings, []
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if settings.normalize_codes and settings.chunks == 1 and isinstance(model.quantize, VectorQuantizer):
        # The nearest entry of unit length is the one at the smallest angle, whatever the length of the vector.
        tensors["quantize.embedding.weight"] = F.normalize(tensors["quantize.embedding.weight"], dim=-1)
        settings = settings.model_copy(update={"normalize_codes": False})
        notes.append("the codebook entries have unit length, which gives the same codes (normalize_codes)")
    if not settings.image_size.is_square:
        side = min(settings.image_size)
        notes.append(f"the training images had {settings.image_size.in_words}; the config has the shorter side, {side}")
    wrong = family.lacks(settings)
    if wrong:
        raise BadRequestError(
            f"the format {family.key} cannot hold vq.{', vq.'.join(wrong)}", "Export it with --to safetensors."
        )
    levels = len(settings.multipliers)
    named = {family.names.to_theirs(name, levels): tensor for name, tensor in family.convert_back(tensors).items()}
    assert None not in named, "a tensor has no name in this format"
    return {str(name): tensor for name, tensor in named.items()}, family.config(settings), notes
