"""The PatchGAN discriminator (Isola et al. 2017) in VQGAN's form."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization over the batches of all ranks.

    It has no running statistics, since the discriminator is used in training only. nn.SyncBatchNorm does not run on the
    CPU, on which the tests compare several ranks with a single process.

    Args:
        channels: Number of channels, C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [B, C, H, W] of any float type; with several ranks, B is this rank's share of the batch."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        full = x.float()
        mean = self._mean(full)
        variance = self._mean((full - mean).square())
        scale = self.weight[:, None, None] * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], full - mean, scale).to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        """Return the mean over images and positions of all ranks, [1, C, 1, 1]; each rank has equally many images."""
        mean: Tensor = _SumOfRanks.apply(x.mean((0, 2, 3), keepdim=True))
        return mean / dist.get_world_size()


class _SumOfRanks(torch.autograd.Function):
    """Sum a tensor over the ranks, and its gradient too, since the losses of all ranks depend on each rank's tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - the context type of torch
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return _SumOfRanks.forward(ctx, gradient)


class PatchDiscriminator(nn.Module):
    """4x4 convolutions that classify overlapping patches of an image as real or reconstructed.

    Args:
        channels: Base width; each layer doubles it, up to eight times the base width.
        layers: Number of strided layers; 3 gives patches of 70 x 70 pixels.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.layers = layers
        body: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            before, width = width, channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            body += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
                BatchNorm(width),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*body, nn.Conv2d(width, 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to a logit for each patch, [B, 1, H', W']; a high logit means real."""
        return self.main(images)


def _initialise(module: nn.Module) -> None:
    """Initialize a layer as DCGAN and PatchGAN do."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
