"""LlamaGen's VQModel: VQ-16 and VQ-8, for inference and with the state of their training."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from movq_cli.interop.family import Claims, Family
from movq_cli.interop.names import NameTable


class LlamaGen(Family):
    """LlamaGen's VQModel, whose codes are compared as vectors of unit length."""

    key = "llamagen"
    mark = re.compile(r"(encoder|decoder)\.(conv_blocks|mid\.\d)\.")
    names = NameTable(
        parts=[
            ("encoder.conv_blocks.{i}.res.{j}", "encoder.down.{i}.block.{j}"),
            ("encoder.conv_blocks.{i}", "encoder.down.{i}"),
            ("decoder.conv_blocks.{r}.res.{j}", "decoder.up.{r}.block.{j}"),
            ("decoder.conv_blocks.{r}", "decoder.up.{r}"),
            ("{side}.mid.0", "{side}.mid.block_1"),
            ("{side}.mid.1", "{side}.mid.attn_1"),
            ("{side}.mid.2", "{side}.mid.block_2"),
            ("{side}.norm_out", "{side}.norm_out"),
        ]
    )
    first_level = "encoder.conv_blocks.{i}"
    ignored = ("quantize.codebook_used",)
    settings: ClassVar[Mapping[str, Any]] = {"normalize_codes": True, "image_range": "-1,1"}
    training: ClassVar[Mapping[str, Any]] = {
        "l1_weight": 0.0,
        "l2_weight": 1.0,
        "codebook_weight": 1.0,
        "commitment_weight": 0.25,
    }

    def license(self, names: Collection[str], config: Mapping[str, Any]) -> str:
        """Return the license of LlamaGen's repository."""
        return "LlamaGen: MIT"

    def claims(self, config: Mapping[str, Any], part: str) -> Claims | None:
        """Read the arguments of LlamaGen's training, which its training files hold."""
        if "codebook_embed_dim" not in config:
            return None
        facts = {
            "code_dim": ("codebook_embed_dim", config["codebook_embed_dim"]),
            "codebook_size": ("codebook_size", config["codebook_size"]),
            "quantizer": ("vq_model", "vq"),
        }
        settings = {"normalize_codes": ("codebook_l2_norm", bool(config.get("codebook_l2_norm", True)))}
        if isinstance(config.get("image_size"), int):
            settings["resolution"] = ("image_size", config["image_size"])
        return Claims(facts, settings)


FAMILY = LlamaGen()
