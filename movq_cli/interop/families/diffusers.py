"""diffusers' VQModel: Kandinsky's `movq`, aMUSEd's `vqvae`, and latent-diffusion's converted ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from movq_cli.interop.architecture import has_kandinsky_modulation
from movq_cli.interop.family import Claims, Family
from movq_cli.interop.names import NameTable
from movq_cli.settings import TokenizerSettings

_BLOCKS = {
    "DownEncoderBlock2D": False,
    "AttnDownEncoderBlock2D": True,
    "UpDecoderBlock2D": False,
    "AttnUpDecoderBlock2D": True,
}
"""Types of blocks, and whether they have attention."""


_ATTENTION = re.compile(r".*\.attn(\.|_)\d+\.(q|k|v|proj_out)\.weight")
"""Our names of attention's 1x1 convolutions, which are linear layers in diffusers."""


class Diffusers(Family):
    """diffusers' VQModel, with the names of its attention since version 0.17 and those before."""

    key = "diffusers"
    mark = re.compile(r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block)\.")
    names = NameTable(
        parts=[
            ("encoder.down_blocks.{i}.resnets.{j}", "encoder.down.{i}.block.{j}"),
            ("encoder.down_blocks.{i}.attentions.{j}", "encoder.down.{i}.attn.{j}"),
            ("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder.down.{i}.downsample.conv"),
            ("decoder.up_blocks.{r}.resnets.{j}", "decoder.up.{r}.block.{j}"),
            ("decoder.up_blocks.{r}.attentions.{j}", "decoder.up.{r}.attn.{j}"),
            ("decoder.up_blocks.{r}.upsamplers.0.conv", "decoder.up.{r}.upsample.conv"),
            ("{side}.mid_block.resnets.0", "{side}.mid.block_1"),
            ("{side}.mid_block.attentions.0", "{side}.mid.attn_1"),
            ("{side}.mid_block.resnets.1", "{side}.mid.block_2"),
            ("{side}.conv_norm_out", "{side}.norm_out"),
        ],
        inside=[
            ("spatial_norm.norm_layer", "norm.norm_layer"),
            ("spatial_norm.conv_y", "norm.conv_y"),
            ("spatial_norm.conv_b", "norm.conv_b"),
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
            ("conv_shortcut", "nin_shortcut"),
            # The names of attention before version 0.17.
            ("query", "q"),
            ("key", "k"),
            ("value", "v"),
            ("proj_attn", "proj_out"),
        ],
    )
    first_level = "encoder.down_blocks.{i}"

    def license(self, names: Collection[str], config: Mapping[str, Any]) -> str:
        """Return that it differs by model."""
        return "that of the repository with this folder; the code of diffusers is Apache-2.0"

    def complete(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the matrices of attention the two kernel axes of a 1x1 convolution."""
        return {
            name: tensor[:, :, None, None] if tensor.ndim == 2 and not name.startswith("quantize.") else tensor
            for name, tensor in tensors.items()
        }

    def convert_back(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the 1x1 convolutions of attention the shape of matrices."""
        return {name: tensor[:, :, 0, 0] if _ATTENTION.fullmatch(name) else tensor for name, tensor in tensors.items()}

    def lacks(self, settings: TokenizerSettings) -> list[str]:
        """Return what VQModel does not have."""
        is_modulated = settings.modulation is not None
        wrong = {
            "chunks": settings.chunks != 1,
            "quantizer": settings.quantizer != "vq",
            "multipliers": settings.multipliers[0] != 1,
            "initial_feature": settings.initial_feature != "quantized",
            "normalize_codes": settings.normalize_codes,
            "modulation": is_modulated and not has_kandinsky_modulation(settings),
            "embed_dim": is_modulated and settings.embed_dim != settings.z_channels,
        }
        return [f"{name} = {getattr(settings, name)}" for name, is_wrong in wrong.items() if is_wrong]

    def config(self, settings: TokenizerSettings) -> dict[str, Any]:
        """Return the config.json of VQModel."""
        has_attention = [level in settings.attention_levels for level in range(len(settings.multipliers))]
        return {
            "_class_name": "VQModel",
            "_diffusers_version": "0.30.0",
            "act_fn": "silu",
            "block_out_channels": list(settings.widths),
            "down_block_types": [f"{'Attn' if has else ''}DownEncoderBlock2D" for has in has_attention],
            "in_channels": 3,
            "latent_channels": settings.z_channels,
            "layers_per_block": settings.blocks,
            "lookup_from_codebook": settings.image_range == "0,1",
            "mid_block_add_attention": settings.mid_attention,
            "norm_num_groups": settings.norm_groups,
            "norm_type": "group" if settings.modulation is None else "spatial",
            "num_vq_embeddings": settings.codebook_size,
            "out_channels": 3,
            "sample_size": min(settings.image_size),
            "up_block_types": [f"{'Attn' if has else ''}UpDecoderBlock2D" for has in reversed(has_attention)],
            "vq_embed_dim": settings.embed_dim,
        }

    def claims(self, config: Mapping[str, Any], part: str) -> Claims | None:
        """Read the `config.json` of a VQModel; that of a KL autoencoder says why it is refused."""
        if config.get("_class_name") == "AutoencoderKL":
            return Claims(refused="it is a KL autoencoder, which has no codebook")
        if config.get("_class_name") != "VQModel":
            return None
        down, up = list(config["down_block_types"]), list(config["up_block_types"])
        unknown = [kind for kind in (*down, *up) if kind not in _BLOCKS]
        refused = [f"it has blocks of type {unknown[0]}"] if unknown else []
        levels = [level for level, kind in enumerate(down) if _BLOCKS.get(kind)]
        if levels != [len(up) - 1 - level for level, kind in reversed(list(enumerate(up))) if _BLOCKS.get(kind)]:
            refused.append("its encoder and decoder have attention at different levels")
        if config.get("act_fn", "silu") not in {"silu", "swish"}:
            refused.append(f"its activation is {config['act_fn']}")
        widths, latent = list(config["block_out_channels"]), config["latent_channels"]
        facts = {
            "in_channels": ("in_channels", config.get("in_channels", 3)),
            "out_channels": ("out_channels", config.get("out_channels", 3)),
            "widths": ("block_out_channels", widths),
            "blocks": ("layers_per_block", config.get("layers_per_block", 1)),
            "attention_levels": ("down_block_types", levels),
            "mid_attention": ("mid_block_add_attention", config.get("mid_block_add_attention", True)),
            "z_channels": ("latent_channels", latent),
            "embed_dim": ("vq_embed_dim", config.get("vq_embed_dim") or latent),
            "codebook_size": ("num_vq_embeddings", config.get("num_vq_embeddings", 256)),
            "is_modulated": ("norm_type", config.get("norm_type", "group") == "spatial"),
            "quantizer": ("_class_name", "vq"),
        }
        settings = {"norm_groups": ("norm_num_groups", config.get("norm_num_groups", 32))}
        if isinstance(config.get("sample_size"), int):
            settings["resolution"] = ("sample_size", config["sample_size"])
        if config.get("lookup_from_codebook"):
            # Only aMUSEd's tokenizer has this key set, and its pipeline gives it images in [0, 1].
            settings["image_range"] = ("lookup_from_codebook, which aMUSEd has", "0,1")
        return Claims(facts, settings, "; ".join(refused))


FAMILY = Diffusers()
