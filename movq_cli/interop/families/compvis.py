"""taming-transformers, latent-diffusion and MoVQGAN, whose names are ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from movq_cli.interop.architecture import has_kandinsky_modulation
from movq_cli.interop.family import Claims, Family
from movq_cli.interop.names import NameTable
from movq_cli.settings import TokenizerSettings

_REFUSED_KEYS = {
    "double_z": "it is a KL autoencoder, which has no codebook",
    "tanh_out": "its decoder ends with tanh",
    "use_linear_attn": "its attention is linear",
    "remap": "its codes are remapped",
}
"""Keys of a config that must be false or null, and what they mean otherwise."""


_LOSS = "torch.nn.Identity"
"""A loss that every config can name, since the weights of none are exported."""

_SCHEDULE = {"warm_up_steps": 0, "max_decay_steps": 1_000_001, "lr_start": 0.9, "lr_max": 0.9, "lr_min": 1e-6}
"""Temperature of GumbelVQ's training, which its class needs to be built."""


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

    def lacks(self, settings: TokenizerSettings) -> list[str]:
        """Return what none of the classes of these projects has."""
        is_modulated = settings.modulation is not None
        wrong = {
            "chunks": settings.chunks != 1,
            "norm_groups": settings.norm_groups != 32,
            "initial_feature": settings.initial_feature != "quantized",
            "normalize_codes": settings.normalize_codes,
            "modulation": is_modulated and not has_kandinsky_modulation(settings),
            "mid_attention": not settings.mid_attention and (bool(settings.attention_levels) or is_modulated),
            "quantizer": settings.quantizer not in {"vq", "gumbel"}
            or (settings.quantizer == "gumbel" and (is_modulated or settings.z_channels != settings.embed_dim)),
        }
        return [f"{name} = {getattr(settings, name)}" for name, is_wrong in wrong.items() if is_wrong]

    def config(self, settings: TokenizerSettings) -> dict[str, Any]:
        """Return the config of taming's class, or of latent-diffusion's or MoVQGAN's where taming has none."""
        target = "taming.models.vqgan.VQModel"
        architecture: dict[str, Any] = {
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
        params: dict[str, Any] = {"embed_dim": settings.embed_dim, "n_embed": settings.codebook_size}
        if settings.modulation is not None:
            target = "movqgan.models.vqgan.MOVQ"
        elif settings.quantizer == "gumbel":
            target = "taming.models.vqgan.GumbelVQ"
            schedule = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": _SCHEDULE}
            params |= {"kl_weight": 1e-8, "temperature_scheduler_config": schedule}
        elif not settings.mid_attention:
            target = "ldm.models.autoencoder.VQModel"
            architecture["attn_type"] = "none"
        params |= {"ddconfig": architecture, "lossconfig": {"target": _LOSS}}
        return {"model": {"target": target, "params": params}}

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
