"""Small weight files of each family, as its project writes them, with the tokenizer that they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from movq_cli.interop.importer import Imported, ImportOptions, import_tokenizer
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import ModulationSettings, TokenizerSettings

Tensors = dict[str, Tensor]

VQGAN = TokenizerSettings(
    resolution=16,
    channels=32,
    multipliers=(1, 2),
    blocks=1,
    attention_resolutions=(8,),
    z_channels=8,
    embed_dim=6,
    chunks=1,
    codebook_size=20,
    initial_feature="quantized",
    modulation=None,
)


def varied(**changes: Any) -> TokenizerSettings:
    """Return the settings of the small VQGAN with changes."""
    return TokenizerSettings.model_validate({**dict(VQGAN), **changes})


THREE_LEVELS = varied(multipliers=(2, 1, 1), blocks=2, attention_resolutions=(8, 4), embed_dim=8)
NO_ATTENTION = varied(attention_resolutions=(), mid_attention=False)
MOVQ = varied(modulation=ModulationSettings(levels=2, source="quantized", affine=True))
GUMBEL = varied(quantizer="gumbel")
UNIT = varied(normalize_codes=True)


def tokenizer(settings: TokenizerSettings, seed: int = 0) -> Tokenizer:
    """Return a tokenizer in eval mode with random weights, none of which is 0 or 1."""
    torch.manual_seed(seed)
    model = Tokenizer(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.normal_(parameter, std=0.5 if "embed" in name else 0.08)
    return model.requires_grad_(False)


def images(side: int = 16, count: int = 2) -> Tensor:
    """Return random images in [-1, 1], which are not square."""
    return torch.rand(count, 3, side, 2 * side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def in_diffusers(state: Tensors, levels: int, *, old: bool = False) -> Tensors:
    """Return the tensors by diffusers' names; `old` gives those of attention before version 0.17."""
    result = {}
    for ours, tensor in state.items():
        name = _diffusers_name(ours, levels, old=old)
        is_matrix = "attentions" in name and tensor.ndim == 4 and ".spatial_norm." not in name
        result[name] = (tensor[:, :, 0, 0] if is_matrix else tensor).clone()
    return result


def _diffusers_name(name: str, levels: int, *, old: bool) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "up"]:
        parts[2] = str(levels - 1 - int(parts[2]))
    name = ".".join(parts)
    name = re.sub(r"encoder\.down\.(\d+)", r"encoder.down_blocks.\1", name)
    name = re.sub(r"decoder\.up\.(\d+)", r"decoder.up_blocks.\1", name)
    name = name.replace(".block.", ".resnets.").replace(".attn.", ".attentions.")
    name = name.replace("downsample.conv", "downsamplers.0.conv").replace("upsample.conv", "upsamplers.0.conv")
    name = name.replace("mid.block_1", "mid_block.resnets.0").replace("mid.block_2", "mid_block.resnets.1")
    name = name.replace("mid.attn_1", "mid_block.attentions.0").replace("norm_out", "conv_norm_out")
    name = name.replace("nin_shortcut", "conv_shortcut")
    if "attentions" in name:
        theirs = ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
        for ours, their in zip(("q", "k", "v", "proj_out"), theirs, strict=True):
            name = re.sub(rf"\.{ours}\.(weight|bias)$", rf".{their}.\1", name)
        is_modulated = re.search(r"\.norm\.(conv_|norm_layer)", name)
        name = name.replace(".norm.", ".spatial_norm." if is_modulated else ".group_norm.")
    return name


def diffusers_config(settings: TokenizerSettings, **changes: Any) -> dict[str, Any]:
    """Return the config.json of diffusers' VQModel."""
    sides = [min(settings.image_size) // 2**level for level in range(len(settings.widths))]
    attention = [side in settings.attention_resolutions for side in sides]
    return {
        "_class_name": "VQModel",
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "block_out_channels": list(settings.widths),
        "down_block_types": [f"{'Attn' * has}DownEncoderBlock2D" for has in attention],
        "up_block_types": [f"{'Attn' * has}UpDecoderBlock2D" for has in reversed(attention)],
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": settings.z_channels,
        "layers_per_block": settings.blocks,
        "mid_block_add_attention": settings.mid_attention,
        "norm_num_groups": settings.norm_groups,
        "norm_type": "group" if settings.modulation is None else "spatial",
        "num_vq_embeddings": settings.codebook_size,
        "sample_size": min(settings.image_size),
        "vq_embed_dim": settings.embed_dim,
        **changes,
    }


def in_llamagen(state: Tensors, levels: int) -> Tensors:
    """Return the tensors by LlamaGen's names, with its buffer of used codes."""
    result = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1] in {"down", "up"}:
            level = int(parts[2]) if parts[1] == "down" else levels - 1 - int(parts[2])
            parts[1:3] = ["conv_blocks", str(level)]
            parts = ["res" if part == "block" else part for part in parts]
        middle = {"block_1": "0", "attn_1": "1", "block_2": "2"}
        parts = [middle.get(part, part) for part in parts]
        result[".".join(parts)] = tensor.clone()
    return {**result, "quantize.codebook_used": torch.zeros(65536)}


def compvis_config(settings: TokenizerSettings, target: str = "taming.models.vqgan.VQModel") -> dict[str, Any]:
    """Return the config of a tokenizer of taming, latent-diffusion or MoVQGAN."""
    architecture = {
        "double_z": False,
        "z_channels": settings.z_channels,
        "resolution": min(settings.image_size),
        "in_channels": 3,
        "out_ch": 3,
        "ch": settings.channels,
        "ch_mult": list(settings.multipliers),
        "num_res_blocks": settings.blocks,
        "attn_resolutions": list(settings.attention_resolutions),
        "dropout": 0.0,
    }
    if not settings.mid_attention:
        architecture["attn_type"] = "none"
    params = {"embed_dim": settings.embed_dim, "n_embed": settings.codebook_size, "ddconfig": architecture}
    return {"model": {"target": target, "params": params}}


def training_tensors(side: int = 4) -> Tensors:
    """Return tensors of a loss as training stores them: a discriminator's and the first ones of LPIPS."""
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(3, side, 4),
        nn.LeakyReLU(0.2),
        nn.Conv2d(side, 2 * side, 4, bias=False),
        nn.BatchNorm2d(2 * side),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * side, 1, 4),
    )
    state = {f"loss.discriminator.main.{name}": tensor for name, tensor in layers.state_dict().items()}
    return {**state, "loss.perceptual_loss.net.slice1.0.weight": torch.randn(4, 3, 3, 3)}


def write(path: Path, values: Any, *, legacy: bool = False) -> Path:
    """Write values as torch.save does."""
    torch.save(values, path, _use_new_zipfile_serialization=not legacy)
    return path


def lightning(path: Path, state: Mapping[str, Tensor], **others: Any) -> Path:
    """Write a state dict as a checkpoint of Lightning."""
    return write(path, {"epoch": 3, "state_dict": dict(state), "optimizer_states": [{"state": {}}], **others})


def load(source: Path, **options: Any) -> Imported:
    """Import a file with options."""
    return import_tokenizer(source, ImportOptions(**options))
