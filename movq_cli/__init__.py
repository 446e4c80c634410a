"""movq: train and run MoVQ, a modulated VQ tokenizer and an image prior that samples in 8 steps.

In Python, `from movq_cli import Prior, Tokenizer`; on the command line, `movq --help`.
"""

from __future__ import annotations

from movq_cli.version import __version__

TYPE_CHECKING = False  # `typing` takes 20 ms to import, in which no signal is handled yet.
if TYPE_CHECKING:
    from typing import Any

    from movq_cli.api import Prior, Tokenizer

__all__ = ["Prior", "Tokenizer", "__version__"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562's signature
    """Import the models, and torch with them, at their first use, so that `movq --help` stays fast."""
    if name in {"Prior", "Tokenizer"}:
        from movq_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
