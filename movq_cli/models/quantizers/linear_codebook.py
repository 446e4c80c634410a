"""SimVQ: a codebook that is trained as one linear layer over frozen random vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from movq_cli.models.quantizer import Quantizer
from movq_cli.models.quantizers.vector import VectorQuantizer
from movq_cli.settings import TokenizerSettings

NAME = "simvq"


class LinearCodebookQuantizer(VectorQuantizer):
    """A vector quantizer whose entries are C W^T + b: C is random and frozen, and the layer (W, b) is trained.

    This is SimVQ (Zhu et al. 2024, "Addressing representation collapse in vector quantized models with one linear
    layer", section 4). The gradient of any chosen entry moves all entries, so that none is left behind. C is drawn from
    a normal distribution of variance 1/d, as in the authors' code.

    Args:
        codebook_size: Number of codebook entries, K.
        code_dim: Width of an entry, d.
        normalize: Whether chunks and entries are scaled to unit length, as in VectorQuantizer.
    """

    def __init__(self, codebook_size: int, code_dim: int, *, normalize: bool = False) -> None:
        super().__init__(codebook_size, code_dim, normalize=normalize)
        nn.init.normal_(self.embedding.weight, std=code_dim**-0.5)
        self.embedding.requires_grad_(False)
        self.embedding_proj = nn.Linear(code_dim, code_dim)

    def revive(
        self, unused: Tensor, encoded: Tensor, sample_rows: Callable[[Tensor, int], Tensor]
    ) -> Mapping[str, Tensor]:
        """Move nothing: unused entries follow the others by themselves."""
        return {}

    def _codebook(self) -> Tensor:
        """Return the codebook [K, d]: the frozen vectors after the layer."""
        entries: Tensor = self.embedding_proj(self.embedding.weight)
        return entries


def build(settings: TokenizerSettings) -> Quantizer:
    """Return an untrained quantizer."""
    return LinearCodebookQuantizer(settings.codebook_size, settings.code_dim, normalize=settings.normalize_codes)
