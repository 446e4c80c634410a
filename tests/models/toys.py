"""The smallest quantizer, prior and decoding order that work: the examples of the recipes for contributors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from movq_cli.models import draws
from movq_cli.models.code_prior import CodePrior
from movq_cli.models.quantizer import Quantized, Quantizer
from movq_cli.setting_types import MaskSchedule
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings, TokenizerSettings


class SignQuantizer(Quantizer):
    """Round each of a code's d channels to one of two levels (Mentzer et al. 2023): no codebook and no losses.

    Args:
        settings: Settings of the tokenizer; its codebook_size K has to be 2^d, d being the width of a code.
    """

    def __init__(self, settings: TokenizerSettings) -> None:
        super().__init__()
        self.width = settings.code_dim
        assert settings.codebook_size == 2**self.width

    def forward(self, z: Tensor) -> Quantized:
        """Quantize features [B, D, h, w]; the gradient passes straight through the rounding."""
        codes = self.encode(z)
        bounded = z.float().tanh()
        return Quantized(bounded + (self.decode(codes) - bounded).detach(), codes, {})

    def encode(self, z: Tensor) -> Tensor:
        """Return the codes [B, h, w, c] of features [B, D, h, w]: bit j of a code is the sign of its channel j."""
        bits = (z.permute(0, 2, 3, 1).unflatten(-1, (-1, self.width)) > 0).long()
        return (bits << torch.arange(self.width, device=z.device)).sum(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors [B, D, h, w] of codes [B, h, w, c], with values -1 and 1."""
        bits = (codes[..., None] >> torch.arange(self.width, device=codes.device)) & 1
        return (2.0 * bits - 1).flatten(-2).permute(0, 3, 1, 2)


class IndependentPrior(CodePrior):
    """Predict each code from its position alone: the codes of an image are independent of each other.

    Args:
        settings: Sizes of the transformer, which this prior does not use.
        shape: Shape of the tokenizer's codes.
    """

    run_suffix = "independent"
    decoding = "draws all codes at once"
    unused_sample_settings = frozenset(
        {"steps", "choice_temperature", "order", "mask_schedule"}
        | {"guidance", "guidance_schedule", "guidance_power", "guidance_interval"}
    )

    def __init__(self, settings: PriorSettings, shape: CodeShape) -> None:
        super().__init__(settings, shape)
        self.independent_logits = nn.Parameter(torch.zeros(*shape.size, shape.codebook_size))

    def forward(self, codes: Tensor, classes: Tensor | None = None) -> Tensor:
        """Return the logits [B, h, w, c, K], the same for every image."""
        return self.independent_logits.expand(len(codes), -1, -1, -1, -1)

    def targets(self, images: int, generator: torch.Generator, schedule: MaskSchedule = "cosine") -> Tensor:
        """Return all codes, [B, h, w, c] bool."""
        return torch.ones(images, *self.shape.size, dtype=torch.bool, device=generator.device)

    def inputs(self, codes: Tensor, targets: Tensor) -> Tensor:
        """Return the codes as they are, since `forward` does not read them."""
        return codes

    @torch.inference_mode()
    def decode(
        self,
        seeds: Sequence[int],
        classes: Tensor | None,
        settings: SampleSettings,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw the codes of images at once; see CodePrior.decode."""
        uniforms = draws.image_uniforms(seeds, self.shape.size).to(self.position.device)
        logits = self.independent_logits.expand(len(seeds), -1, -1, -1, -1)
        codes, _ = draws.draw_codes(logits, uniforms, settings)
        return codes if known is None else torch.where(known.to(codes.device) == self.unknown, codes, known)


def raster(log_probability: Tensor, uniforms: Tensor, step: int, settings: SampleSettings, shape: CodeShape) -> Tensor:
    """Decide the codes row by row, from the top left to the bottom right; see masked_prior.Order."""
    return -torch.arange(log_probability.shape[1], device=uniforms.device).expand(uniforms.shape).float()
