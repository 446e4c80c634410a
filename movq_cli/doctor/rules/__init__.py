"""The rules, by subject: a module for each."""

from __future__ import annotations

from movq_cli.doctor.rule import Rule
from movq_cli.doctor.rules import adversary, codebook, images, optimization, prior

RULES: tuple[Rule, ...] = (
    codebook.COLLAPSE,
    adversary.NEVER_STARTED,
    adversary.TOO_EARLY,
    adversary.TOO_STRONG,
    adversary.LEARNS_NOTHING,
    adversary.WEIGHT_AT_LIMIT,
    images.COLOR,
    images.CHECKERBOARD,
    prior.WRONG_TOKENIZER,
    prior.WRONG_VIEWS,
    prior.NOT_BELOW_UNIGRAM,
    optimization.DIVERGES,
    optimization.TOO_SLOW,
    optimization.OVERFITS,
    optimization.SAMPLES_DO_NOT_IMPROVE,
    optimization.AVERAGE_NOT_WARM,
    optimization.BOUND_BY_DATA,
    optimization.FEW_VALIDATION_IMAGES,
)
"""All rules, in the order in which findings are reported: causes before what follows from them."""
