"""The pretrained networks that judge images: Inception and VGG for sets, LPIPS for pairs."""

from __future__ import annotations

import io
import sys
import textwrap
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from movq_cli.evaluation.pretrained import find_weights, is_available, read_tensors, unusable
from movq_cli.files import sha256

Trunk = Literal["vgg", "alex"]

INCEPTION_WIDTH = 2048
"""Of its pool features."""

SMALLEST_SIDE: Mapping[Trunk, int] = {"alex": 31, "vgg": 16}
"""Pixels a side below which a trunk's pooling leaves nothing."""


class Frozen(nn.Module):
    """A pretrained network that nothing moves: no gradient for its weights, eval(), float32.

    Gradients with respect to its inputs flow. A parent's train() does not reach it, nor does its autocast.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval(): dropout and batch statistics would make the judge random."""
        super().train(False)
        return self


class LPIPS(Frozen):
    """Learned perceptual distance (Zhang et al. 2018, version 0.1), with the lpips library's linear heads."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [N, 1, 1, 1] between images [N, 3, H, W] in [-1, 1]; 0 for identical ones."""
        with torch.autocast(a.device.type, enabled=False):
            distance: Tensor = self.network(a.float(), b.float())
        return distance


class FeatureExtractor(Frozen):
    """A network by whose features sets of images are compared.

    Args:
        network: Gives its features of uint8 images first.
        name: Of the convention, for reports and for what is kept.
        width: Features an image, D.
        weights: The file that they came from.
    """

    def __init__(self, network: nn.Module, name: str, width: int, weights: Path) -> None:
        super().__init__(network)
        self.name = name
        self.width = width
        self.weights = weights
        self.digest = sha256(weights)

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, D] of uint8 images [N, 3, H, W], resized inside to the network's own size."""
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self.network(images)[0]
        return features


class Inception(FeatureExtractor):
    """FID's Inception-v3 and its pool features, with TensorFlow's resizing to 299 x 299."""

    def logits(self, pool: Tensor) -> Tensor:
        """Class logits [N, 1008] without their bias, Inception Score's, of pool features [N, 2048]."""
        return pool @ cast(nn.Linear, self.network.fc).weight.T


def available_trunks(folder: Path | None = None) -> list[Trunk]:
    """The LPIPS trunks whose weights are on this machine, AlexNet first."""
    return [trunk for trunk in SMALLEST_SIDE if is_available(trunk, folder)]


def load_inception(folder: Path | None = None, device: torch.device | str = "cpu") -> Inception:
    """FID's Inception-v3 with its published weights: torch-fidelity's network, its features to a millionth.

    The normalisations are folded into the convolutions, which work on images with the channels last: on two CPU cores
    1.6 times as fast as the network as it comes.

    Args:
        folder: Searched for the weights before torch hub's folder.
        device: Where the network runs.

    Raises:
        BadRequestError: The weights are missing, hold code, or have another layout.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

    path = find_weights("inception", folder)
    with _quiet(), _layout_of(path):
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=_copy(path))
    for layer in network.modules():
        if isinstance(layer, BasicConv2d):
            layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
    network.to(memory_format=torch.channels_last)
    return Inception(network, "inception-v3-compat", INCEPTION_WIDTH, path).to(device)


def load_vgg(folder: Path | None = None, device: torch.device | str = "cpu") -> FeatureExtractor:
    """VGG-16's second hidden layer after its ReLU: StyleGAN's convention for precision and recall.

    Args:
        folder: Searched for the weights before torch hub's folder.
        device: Where the network runs.

    Raises:
        BadRequestError: The weights are missing, hold code, or have another layout.
    """
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

    path = find_weights("vgg", folder)
    # torchvision draws random weights first: that must not move the caller's random stream.
    with _quiet(), _layout_of(path), torch.random.fork_rng(devices=[]):
        network = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=_copy(path))
    network.to(memory_format=torch.channels_last)
    return FeatureExtractor(network, "vgg16", 4096, path).to(device)


def load_lpips(trunk: Trunk, folder: Path | None = None, device: torch.device | str = "cpu") -> LPIPS:
    """LPIPS with torchvision's ImageNet weights as its trunk.

    Args:
        trunk: "vgg" (VGG-16, the perceptual loss of VQGAN and MoVQ) or "alex" (AlexNet, the usual figure).
        folder: Searched for the weights before torch hub's folder.
        device: Where the network runs.

    Raises:
        BadRequestError: The weights are missing, hold code, or have another layout.
    """
    path = find_weights(trunk, folder)
    tensors = read_tensors(path)
    # lpips draws a random trunk first: that must not move the caller's random stream.
    with _quiet(), torch.random.fork_rng(devices=[]):
        import lpips

        network = lpips.LPIPS(net=trunk, pretrained=True, pnet_rand=True, verbose=False)
    # lpips cuts the trunk into slices; put back together, its layers bear torchvision's names.
    layers = OrderedDict(layer for part in network.net.children() for layer in part.named_children())
    features = nn.ModuleDict({"features": nn.Sequential(layers)})
    with _layout_of(path):
        # The classifier is no part of LPIPS; anything else that is missing or odd is an error.
        features.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("classifier.")})
    return LPIPS(network).to(device)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without gradients, and float32 as it is: TF32 would move the figures in their fourth digit."""
    # Pillow's notices are silenced for each image, in threads, whose restored filters may be each other's: the
    # outermost block has the last word.
    with torch.inference_mode(), warnings.catch_warnings(), cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _copy(path: Path) -> io.BytesIO:
    """Weights as a file in memory: torch-fidelity unpickles whatever it is given, so it gets our own copy."""
    copy = io.BytesIO()
    torch.save(read_tensors(path), copy)
    copy.seek(0)
    return copy


@contextmanager
def _layout_of(path: Path) -> Iterator[None]:
    """Name the file where its tensors are not those of the network."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(": ")[2]
        raise unusable(path, f"another network's layout: {textwrap.shorten(reason, 200)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the libraries print off stdout, and their deprecation notices to themselves."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
