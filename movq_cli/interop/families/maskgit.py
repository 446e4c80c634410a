"""MaskGIT-VQGAN as open-muse and 1d-tokenizer publish it; its layers are rewritten as layers of ours, exactly.

It differs from VQGAN in these layers, with what stands for each:

    shortcut of a block, h + W h with h its output      (I + W) in the second convolution, a shortcut of zeros
    downsampling by the mean of 2 x 2 pixels            a 3x3 convolution of stride 2 with four weights of 1/4
    1x1 convolution at the encoder's end                a 3x3 convolution with its center alone
    decoder levels with as many blocks as the encoder's one more block, which adds 0
    convolutions without bias                           a bias of 0
    no convolutions around the quantizer                1x1 convolutions by the identity
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from movq_cli.interop.family import Claims, Family
from movq_cli.interop.names import NameTable, count


class MaskGIT(Family):
    """MaskGitVQGAN of open-muse, converted from the weights of MaskGIT."""

    key = "maskgit"
    mark = re.compile(r"(encoder|decoder)\.(down\.\d+|up\.\d+|mid\.\d)\.")
    names = NameTable(
        parts=[
            ("{side}.mid.0", "{side}.mid.block_1"),
            ("{side}.mid.1", "{side}.mid.block_2"),
            ("encoder.down.{i}.block.{j}", "encoder.down.{i}.block.{j}"),
            ("decoder.up.{i}.block.{j}", "decoder.up.{i}.block.{j}"),
            ("decoder.up.{i}.upsample_conv", "decoder.up.{i}.upsample.conv"),
            ("{side}.norm_out", "{side}.norm_out"),
        ]
    )
    first_level = "encoder.down.{i}"
    note = "the layers are rewritten as VQGAN's, exactly: it can be exported to compvis and diffusers, not to MaskGIT"
    settings: ClassVar[Mapping[str, Any]] = {"image_range": "0,1"}

    def license(self, names: Collection[str], config: Mapping[str, Any]) -> str:
        """Return the license that its publishers state."""
        return "MaskGIT, open-muse and 1d-tokenizer: Apache-2.0"

    def complete(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rewrite the layers as the module's docstring says."""
        return _with_biases(_with_quantizer_layers(_with_blocks(_with_downsampling(_with_shortcuts(tensors)))))

    def claims(self, config: Mapping[str, Any], part: str) -> Claims | None:
        """Read the config of open-muse's MaskGitVQGAN."""
        if config.get("_class_name") != "MaskGitVQGAN":
            return None
        channels = config["hidden_channels"]
        refused = ["it has attention"] if config.get("attn_resolutions") else []
        facts = {
            "in_channels": ("num_channels", config.get("num_channels", 3)),
            "channels": ("hidden_channels", channels),
            "widths": ("channel_mult", [channels * multiplier for multiplier in config["channel_mult"]]),
            "blocks": ("num_res_blocks", config["num_res_blocks"]),
            "z_channels": ("z_channels", config["z_channels"]),
            "codebook_size": ("num_embeddings", config["num_embeddings"]),
            "embed_dim": ("quantized_embed_dim", config["quantized_embed_dim"]),
            "quantizer": ("_class_name", "vq"),
            "mid_attention": ("attn_resolutions", False),
        }
        settings = {"resolution": ("resolution", config["resolution"])} if "resolution" in config else {}
        return Claims(facts, settings, "; ".join(refused))


def _with_shortcuts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply the second convolution of a block by I + W; the shortcut of the block's input becomes 0."""
    result = dict(tensors)
    for name in [name for name in tensors if name.endswith(".nin_shortcut.weight")]:
        block = name.removesuffix(".nin_shortcut.weight")
        shortcut = tensors[name]
        first, second = (_tensor(tensors, f"{block}.{layer}.weight", 4) for layer in ("conv1", "conv2"))
        width = second.shape[0]
        if shortcut.shape != (width, width, 1, 1):
            raise ValueError(f"{name} is {list(shortcut.shape)}, not {[width, width, 1, 1]}")
        matrix = torch.eye(width, dtype=torch.float64) + shortcut[:, :, 0, 0].double()
        result[f"{block}.conv2.weight"] = torch.einsum("oc,cihw->oihw", matrix, second.double()).float()
        result[name] = torch.zeros(width, first.shape[1], 1, 1)
    return result


def _with_downsampling(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write the mean of 2 x 2 pixels, and the 1x1 convolution at the encoder's end, as 3x3 convolutions."""
    made: dict[str, Tensor] = {}
    for level in range(count(list(tensors), "encoder.down.{i}") - 1):
        width = _tensor(tensors, f"encoder.down.{level}.block.0.conv2.weight", 4).shape[0]
        kernel = torch.zeros(width, width, 3, 3)
        kernel[range(width), range(width), :2, :2] = 0.25
        made[f"encoder.down.{level}.downsample.conv.weight"] = kernel
    last = _tensor(tensors, "encoder.conv_out.weight", 4)
    if last.shape[2:] != (1, 1):
        raise ValueError(f"encoder.conv_out.weight is {list(last.shape)}, not a 1x1 convolution")
    return {**_added(tensors, made), "encoder.conv_out.weight": torch.nn.functional.pad(last, (1, 1, 1, 1))}


def _with_blocks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a block that adds 0 to each level of the decoder."""
    made: dict[str, Tensor] = {}
    for level in range(count(list(tensors), "decoder.up.{i}")):
        number = count(list(tensors), f"decoder.up.{level}.block.{{i}}")
        width = _tensor(tensors, f"decoder.up.{level}.block.{max(0, number - 1)}.conv2.weight", 4).shape[0]
        block = f"decoder.up.{level}.block.{number}"
        made |= {f"{block}.{layer}.weight": torch.zeros(width, width, 3, 3) for layer in ("conv1", "conv2")}
        made |= {f"{block}.{layer}.weight": torch.ones(width) for layer in ("norm1", "norm2")}
        made |= {f"{block}.{layer}.bias": torch.zeros(width) for layer in ("norm1", "norm2")}
    return _added(tensors, made)


def _with_quantizer_layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the two 1x1 convolutions around the quantizer."""
    width = _tensor(tensors, "quantize.embedding.weight", 2).shape[1]
    identity = torch.eye(width)[:, :, None, None]
    return _added(tensors, {"quant_conv.weight": identity, "post_quant_conv.weight": identity.clone()})


def _with_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a bias of 0 to each convolution that has none; those at the ends of the networks have one in MaskGIT too."""
    required = {"encoder.conv_out", "decoder.conv_in", "decoder.conv_out"}
    layers = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.ndim == 4]
    without = [layer for layer in layers if layer not in required and not layer.endswith(".upsample.conv")]
    return _added(tensors, {f"{layer}.bias": torch.zeros(len(tensors[f"{layer}.weight"])) for layer in without})


def _added(tensors: dict[str, Tensor], made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return both; a tensor of the file that stands for a layer which this family does not have is an error."""
    for name in made:
        if name in tensors:
            raise ValueError(f"{name} is not known")
    return tensors | made


def _tensor(tensors: dict[str, Tensor], name: str, axes: int) -> Tensor:
    """Return a tensor that must be in the file with this number of axes."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    if tensors[name].ndim != axes:
        raise ValueError(f"{name} is {list(tensors[name].shape)}, which has not {axes} axes")
    return tensors[name]


FAMILY = MaskGIT()
