"""The perturbed FID of a tokenizer: the FID of reconstructions from codes of which a share was replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from movq_cli.data import pixels
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.models.perturbation import Perturbation, entries_of, perturb
from movq_cli.models.tokenizer import Tokenizer

SHARES = (0.1, 0.3, 0.5)
"""Shares of replaced codes over which the metric is averaged."""

NEIGHBORS = 16
"""Codebook size over the number of nearest entries from which a replaced code is drawn."""


@torch.inference_mode()
def perturbed_fid(
    model: Tokenizer,
    batches: Iterable[Tensor],
    evaluator: FIDEvaluator,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> dict[float, float]:
    """Return the FID of reconstructions from perturbed codes for each share of replaced codes.

    This is the pFID of Qiu et al. 2025 ("Robust latent matters", section 3.3), whose value is the mean over the shares.
    It tells how a decoder copes with the codes that a prior gets wrong. The share 0 gives the rFID.

    Args:
        model: Tokenizer in eval mode.
        batches: Images, uint8 [B, 3, H, W] on the device of the tokenizer.
        evaluator: Evaluator with the statistics of the same images.
        shares: Shares of replaced codes, in [0, 1].
        seed: Seed of the replacements.
    """
    codes = [model.encode(pixels.to_signed(batch)) for batch in batches]
    return {share: fid_of_codes(model, codes, evaluator, share, seed) for share in shares}


@torch.inference_mode()
def fid_of_codes(
    model: Tokenizer, codes: Iterable[Tensor], evaluator: FIDEvaluator, share: float, seed: int = 0
) -> float:
    """Return the FID of the images of perturbed codes.

    Args:
        model: Tokenizer in eval mode.
        codes: Batches of codes, [B, h, w, c] int64 on the device of the tokenizer.
        evaluator: Evaluator with the statistics of the images that have these codes.
        share: Share of replaced codes, in [0, 1]; 0 gives the rFID.
        seed: Seed of the replacements.
    """
    size = model.settings.codebook_size
    entries = entries_of(model.quantize, size, model.device)
    generator = torch.Generator(entries.device).manual_seed(seed)
    perturbation = Perturbation(1.0, share, max(1, size // NEIGHBORS))
    return evaluator.fid(
        pixels.to_bytes(model.decode(perturb(batch, entries, perturbation, generator))) for batch in codes
    )
