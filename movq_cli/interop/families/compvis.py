"""taming-transformers, latent-diffusion and MoVQGAN, whose names are ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from movq_cli.interop.family import Claims, Family
from movq_cli.interop.names import NameTable

_REFUSED_KEYS = {
    "double_z": "it is a KL autoencoder, which has no codebook",
    "tanh_out": "its decoder ends with tanh",
    "use_linear_attn": "its attention is linear",
    "remap": "its codes are remapped",
}
"""Keys of a config that must be false or null, and what they mean otherwise."""


class CompVis(Family):
    """taming's VQModel and GumbelVQ, latent-diffusion's VQModel, and MoVQGAN's MOVQ."""

    key = "compvis"
    mark = re.compile(r"(encoder|decoder)\.(down\.\d+|up\.\d+|mid\.(block|attn)_\d)\.")
    names = NameTable(parts=[("encoder", "encoder"), ("decoder", "decoder")])
    first_level = "encoder.down.{i}"
    settings: ClassVar[Mapping[str, Any]] = {"image_range": "-1,1"}
    # Averages of taming's EMAVectorQuantizer, which only its training needs.
    ignored = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")

    def license(self, names: Collection[str], config: Mapping[str, Any]) -> str:
        """Return the license by the signs of each project: modulated norms, a diffusion model, a config's target."""
        target = str(_get(config, "model", "target"))
        if any(name.endswith("conv_y.weight") for name in names):
            return "MoVQGAN's repository states none; the model card of Kandinsky 2.1 says Apache-2.0"
        if target.startswith("ldm.") or any(name.startswith("model.diffusion_model.") for name in names):
            return "latent-diffusion: MIT"
        return "taming-transformers: MIT for the code, not stated for the weights; latent-diffusion: MIT"

    def claims(self, config: Mapping[str, Any], part: str) -> Claims | None:
        """Read `model.params.ddconfig`, or that of a stage of a transformer or of a diffusion model."""
        model = _get(config, "model")
        stage = _get(model, "params", f"{part}_config") or model
        params = _get(stage, "params")
        if not isinstance(_get(params, "ddconfig"), Mapping):
            return None
        target, dd = str(stage.get("target", "")), params["ddconfig"]
        refused = [reason for key, reason in _REFUSED_KEYS.items() if dd.get(key) or params.get(key)]
        if target.endswith("AutoencoderKL"):
            refused.insert(0, _REFUSED_KEYS["double_z"])
        multipliers, resolution = list(dd["ch_mult"]), int(dd["resolution"])
        attention = str(dd.get("attn_type", "vanilla"))
        if attention not in {"vanilla", "vanilla-xformers", "none"}:
            refused.append(f"its attention is {attention}")
        levels = [level for level in range(len(multipliers)) if resolution // 2**level in dd["attn_resolutions"]]
        facts = {
            "in_channels": ("in_channels", dd.get("in_channels", 3)),
            "out_channels": ("out_ch", dd.get("out_ch", 3)),
            "channels": ("ch", dd["ch"]),
            "widths": ("ch_mult", [dd["ch"] * multiplier for multiplier in multipliers]),
            "blocks": ("num_res_blocks", dd["num_res_blocks"]),
            "attention_levels": ("attn_resolutions", [] if attention == "none" else levels),
            "mid_attention": ("attn_type", attention != "none"),
            "z_channels": ("z_channels", dd["z_channels"]),
            "embed_dim": ("embed_dim", params["embed_dim"]),
            "codebook_size": ("n_embed", params["n_embed"]),
        }
        kinds = {"GumbelVQ": "gumbel", "VQModel": "vq", "VQModelInterface": "vq", "MOVQ": "vq"}
        name = target.rpartition(".")[2]
        if name in kinds:
            facts["quantizer"] = ("target", kinds[name])
            facts["is_modulated"] = ("target", name == "MOVQ")
        return Claims(facts, {"resolution": ("resolution", resolution)}, "; ".join(refused))


def _get(values: object, *keys: str) -> Any:  # noqa: ANN401 - any part of a config
    """Return a nested value of a config; None if it has no such value."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


FAMILY = CompVis()
