"""PatchGAN (Isola et al. 2017), as VQGAN uses it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization over the batches of all ranks, without running statistics: a discriminator only trains.

    nn.SyncBatchNorm refuses the CPU, where the ranks' agreement with a single process is tested.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [B, C, H, W] of any float type; B may be this rank's part of the batch."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        full = x.float()
        mean = self._mean(full)
        variance = self._mean((full - mean).square())
        scale = self.weight[:, None, None] * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], full - mean, scale).to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        """[1, C, 1, 1], over all images and places of all ranks; each rank has equally many."""
        mean: Tensor = _SumOfRanks.apply(x.mean((0, 2, 3), keepdim=True))
        return mean / dist.get_world_size()


class _SumOfRanks(torch.autograd.Function):
    """The sum over the ranks, and backward likewise: what one rank gives, the losses of all depend on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - torch's own context
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return _SumOfRanks.forward(ctx, gradient)


class PatchDiscriminator(nn.Module):
    """Strided 4x4 convolutions that judge overlapping patches, each on its own.

    Args:
        channels: Base width; it doubles with each layer, up to eight times.
        layers: Strided layers; 3 gives patches of 70 x 70 pixels.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
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
        """Map images [B, 3, H, W] in [-1, 1] to a logit a patch, [B, 1, H', W']: high is real."""
        return self.main(images)


def _initialise(module: nn.Module) -> None:
    """The DCGAN initialisation that PatchGAN has always had."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
