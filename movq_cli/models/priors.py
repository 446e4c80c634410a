"""The priors of stage 2, by the settings' mode."""

from __future__ import annotations

from movq_cli.models.autoregressive_prior import AutoregressivePrior, DepthPrior
from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.settings import CodeShape, PriorSettings

CodePrior = MaskedPrior | AutoregressivePrior | DepthPrior


def build(settings: PriorSettings, shape: CodeShape) -> CodePrior:
    """An untrained prior.

    Args:
        settings: Its mode and its sizes.
        shape: Of the tokenizer's codes.
    """
    match settings.mode:
        case "mask":
            return MaskedPrior(settings, shape)
        case "auto":
            return AutoregressivePrior(settings, shape)
        case "depth":
            return DepthPrior(settings, shape)
