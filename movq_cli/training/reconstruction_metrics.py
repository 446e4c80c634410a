"""The metrics of a tokenizer's validation: quality and colors of reconstructions, and the use of the codebook."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from movq_cli.evaluation import extractors
from movq_cli.evaluation.metrics import load_scorers
from movq_cli.evaluation.paired import PairScorer
from movq_cli.models.quantizer import CodebookHealth
from movq_cli.ranks import Ranks
from movq_cli.settings import TokenizerSettings
from movq_cli.training.log import Metrics
from movq_cli.training.stage import Criterion

CRITERIA = {
    "rfid": Criterion("rfid", higher_is_better=False),
    "lpips": Criterion("lpips", higher_is_better=False),
    "psnr": Criterion("psnr", higher_is_better=True),
}
"""The criteria of the best weights, the best criterion first."""


class ReconstructionMetrics:
    """Sums the metrics of a validation over images.

    Args:
        scorers: Metrics of pairs of images.
        settings: Settings of the tokenizer, for the shape of its codes.
        device: Device of the images.
    """

    def __init__(self, scorers: Sequence[PairScorer], settings: TokenizerSettings, device: torch.device) -> None:
        self.scorers = scorers
        self._health = CodebookHealth(settings.chunks, settings.codebook_size).to(device)
        self._colors = ColorError(device)
        # For each scorer, the sum of its finite scores and their number.
        self._totals = torch.zeros(len(scorers), 2, dtype=torch.float64, device=device)

    def update(self, codes: Tensor, reconstructed: Tensor, originals: Tensor) -> None:
        """Add images.

        Args:
            codes: Codes, [B, h, w, c].
            reconstructed: Reconstructions, uint8 [B, 3, H, W].
            originals: Original images, uint8 [B, 3, H, W].
        """
        self._health.update(codes)
        self._colors.update(reconstructed, originals)
        for row, scorer in enumerate(self.scorers):
            scores = scorer.score(reconstructed, originals).double()
            finite = scores.isfinite()
            self._totals[row] += torch.stack([torch.where(finite, scores, 0).sum(), finite.sum()])

    def metrics(self, ranks: Ranks) -> Metrics:
        """Return the metrics over the images of all ranks; every rank must call this once, after its last image."""
        for sums in (self._totals, self._health.counts, self._colors.totals):
            ranks.sum(sums)
        metrics: Metrics = {
            scorer.key: total / count
            for scorer, (total, count) in zip(self.scorers, self._totals.tolist(), strict=True)
            if count
        }
        metrics |= self._colors.metrics()
        health = self._health
        for name, (overall, of_chunks) in (("usage", health.usage()), ("perplexity", health.perplexity())):
            metrics |= {name: overall, f"{name}_of_chunks": of_chunks}
        return metrics


class ColorError:
    """Sums the errors of color over images.

    Args:
        device: Device of the images.
    """

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)
        """Sums over images: error of the mean color, saturation of reconstructions and of originals, and 1."""

    def update(self, reconstructed: Tensor, originals: Tensor) -> None:
        """Add images, uint8 [B, 3, H, W] both."""
        new, old = reconstructed.double(), originals.double()
        error = (new.mean((2, 3)) - old.mean((2, 3))).abs().mean(1)
        self.totals += torch.stack([error.sum(), _saturation(new), _saturation(old), error.new_tensor(len(error))])

    def metrics(self) -> dict[str, float]:
        """Return the mean `color_error`, in 0..255, and the `saturation` of reconstructions over that of originals.

        The saturation of a grey set is 0, and the ratio is then left out.
        """
        error, new, old, count = self.totals.tolist()
        return {"color_error": error / max(count, 1)} | ({"saturation": new / old} if old else {})


def _saturation(images: Tensor) -> Tensor:
    """Return the sum over images of the mean difference between the largest and the smallest channel."""
    return (images.amax(1) - images.amin(1)).mean((1, 2)).sum()


def validation_scorers(side: int, weights: Path | None, device: torch.device) -> list[PairScorer]:
    """Return PSNR, SSIM and, if its weights are available, LPIPS; a metric that needs larger images is left out.

    LPIPS has a single trunk here, AlexNet's if possible: with VGG's too, a validation would take several times as long.
    """
    keys = {"psnr", "ssim"} | ({"lpips"} if extractors.available_trunks(weights) else set())
    fitting = {scorer.key: scorer for scorer in load_scorers(keys, weights, device) if side >= scorer.smallest_side}
    if "lpips" in fitting:
        fitting.pop("lpips_vgg", None)
    return list(fitting.values())


def best_criterion(metrics: Collection[str]) -> Criterion:
    """Return the best criterion among these metrics.

    Adversarial training lowers PSNR although images look better; it lowers FID, which compares distributions.
    """
    return next((criterion for name, criterion in CRITERIA.items() if name in metrics), CRITERIA["psnr"])
