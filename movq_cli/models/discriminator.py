"""The PatchGAN discriminator (Isola et al. 2017) in VQGAN's form, and with the norm and the downsampling of VQGAN+."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_GROUPS = 32
"""Number of groups of a GroupNorm; a width that it does not divide has their greatest common divisor."""


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
    """Sum a tensor over the ranks, and its gradient too, since the losses of all ranks depend on each rank's tensor.

    It can be differentiated twice, as a penalty on gradients needs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - the context type of torch
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        summed: Tensor = _SumOfRanks.apply(gradient)
        return summed


class BlurPool(nn.Module):
    """Downsampling by 2 after a blur with the kernel [1, 2, 1] / 4 in both directions, with zeros around the map.

    This is Triangle-3 of Zhang 2019, "Making convolutional networks shift-invariant again". After a 4x4 convolution of
    stride 1, the results are centered where those of the convolution of stride 2 are, and there are equally many.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, ceil(H / 2), ceil(W / 2)]."""
        # Two means of 2 x 2 values have this kernel. A kernel that is a buffer would be overwritten by
        # DistributedDataParallel between the two forward passes of a step.
        return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1, padding=1), 2)


class PatchDiscriminator(nn.Module):
    """4x4 convolutions that classify overlapping patches of an image as real or reconstructed.

    VQGAN+ (Weber et al. 2024, "MaskBit", section 3.1) replaces the batch normalization by GroupNorm, and the strided
    convolutions by convolutions of stride 1 that a blur-pool downsamples before the norm. Its other changes, to the
    kernels and to the number of logits, are not made here.

    Args:
        channels: Base width; each layer doubles it, up to eight times the base width.
        layers: Number of strided layers; 3 gives patches of 70 x 70 pixels.
        norm: Normalization after all convolutions but the first and the last: `batch`, `group` or `none`.
        blur: Whether a blur-pool downsamples in place of the strides.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "batch", *, blur: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.layers = layers
        self.norm = norm
        self.blur = blur
        body = [*self._convolution(3, channels, 2, bias=True), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            before, width = width, channels * min(2**layer, 8)
            body += self._convolution(before, width, 2 if layer < layers else 1, bias=norm == "none")
            body += [*_norms(norm, width), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*body, nn.Conv2d(width, 1, 4, padding=1))
        self.apply(_initialise)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `train_vq` that give this layout, by their names."""
        return {
            "discriminator_channels": self.channels,
            "discriminator_layers": self.layers,
            "discriminator_norm": self.norm,
            "discriminator_blur": self.blur,
        }

    def _convolution(self, before: int, width: int, stride: int, *, bias: bool) -> Iterator[nn.Module]:
        """Yield a convolution, and with a stride of 2 the blur-pool that replaces it if there is one."""
        blurs = self.blur and stride > 1
        yield nn.Conv2d(before, width, 4, stride=1 if blurs else stride, padding=1, bias=bias)
        if blurs:
            yield BlurPool()

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to a logit for each patch, [B, 1, H', W']; a high logit means real."""
        return self.main(images)


def _norms(norm: str, width: int) -> list[nn.Module]:
    """Return the norm of a layer in a list, which is empty if there is none."""
    if norm == "none":
        return []
    return [BatchNorm(width) if norm == "batch" else nn.GroupNorm(math.gcd(_GROUPS, width), width)]


def _initialise(module: nn.Module) -> None:
    """Initialize a layer as DCGAN and PatchGAN do; a GroupNorm begins without an effect, as in VQGAN+."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
