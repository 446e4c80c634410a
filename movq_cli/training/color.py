"""The errors of colour in reconstructions, which PSNR and LPIPS hardly show."""

from __future__ import annotations

import torch
from torch import Tensor


class ColorError:
    """Sums the errors of colour over images.

    Args:
        device: Device of the images.
    """

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)
        """Sums over images: error of the mean colour, saturation of reconstructions and of originals, and 1."""

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
