"""The quantizers: each is a module of this package with a constant `NAME` and a function `build`.

`NAME` is the name that the setting `vq.quantizer` gives the quantizer. `build` returns an untrained quantizer from
TokenizerSettings, and raises BadRequestError if it cannot have these settings.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from movq_cli.errors import BadRequestError
from movq_cli.models.quantizer import Quantizer
from movq_cli.settings import TokenizerSettings

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]

QUANTIZERS: dict[str, Callable[[TokenizerSettings], Quantizer]] = {module.NAME: module.build for module in _MODULES}
"""The function of each quantizer, by the quantizer's name."""


def build(settings: TokenizerSettings) -> Quantizer:
    """Return an untrained quantizer.

    Args:
        settings: Settings of the tokenizer: the quantizer's name, codebook size, width and chunks.

    Raises:
        BadRequestError: No quantizer has this name, or it cannot have these settings.
    """
    if settings.quantizer not in QUANTIZERS:
        raise BadRequestError(
            f"unknown quantizer {settings.quantizer!r}", f"Known quantizers: {', '.join(sorted(QUANTIZERS))}."
        )
    return QUANTIZERS[settings.quantizer](settings)
