"""The registry of the priors of stage 2: the setting `prior.mode` names one of them."""

from __future__ import annotations

from movq_cli.errors import BadRequestError
from movq_cli.models.autoregressive_prior import AutoregressivePrior, DepthPrior
from movq_cli.models.code_prior import CodePrior
from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.settings import CodeShape, PriorSettings

__all__ = ["PRIORS", "CodePrior", "build", "prior_class"]

PRIORS: dict[str, type[CodePrior]] = {"mask": MaskedPrior, "auto": AutoregressivePrior, "depth": DepthPrior}
"""Class of each mode."""


def prior_class(settings: PriorSettings) -> type[CodePrior]:
    """Return the class of a prior, whose settings are checked.

    Raises:
        BadRequestError: The mode is unknown, or its prior cannot be built with these settings.
    """
    if settings.mode not in PRIORS:
        raise BadRequestError(f"unknown prior.mode {settings.mode!r}", f"Known modes: {', '.join(PRIORS)}.")
    kind = PRIORS[settings.mode]
    kind.check_settings(settings)
    return kind


def build(settings: PriorSettings, shape: CodeShape) -> CodePrior:
    """Return an untrained prior.

    Args:
        settings: Mode and sizes of the prior.
        shape: Shape of the tokenizer's codes.

    Raises:
        BadRequestError: The mode is unknown, or its prior cannot be built with these settings.
    """
    return prior_class(settings)(settings, shape)
