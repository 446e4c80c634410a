"""The pretrained networks of the metrics: Inception and VGG-16 for sets of images, LPIPS for pairs."""

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

from movq_cli.evaluation.pretrained import Network, find_weights, is_available, read_tensors, unusable
from movq_cli.files import sha256_once

Trunk = Literal["vgg", "alex"]

INCEPTION_WIDTH = 2048
"""Number of Inception's pool features."""

SMALLEST_SIDE: Mapping[Trunk, int] = {"alex": 31, "vgg": 16}
"""Smallest side of an image in pixels: of a smaller one the trunk's pooling leaves nothing."""


class Frozen(nn.Module):
    """A pretrained network with fixed weights that stays in eval() and in float32.

    Gradients flow to its inputs, not to its weights. Neither a parent's train() nor its autocast affects it.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval(): with dropout or batch statistics the network would not be deterministic."""
        super().train(False)
        return self


class LPIPS(Frozen):
    """Learned perceptual distance (Zhang et al. 2018, version 0.1), with the lpips library's linear heads."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances [N, 1, 1, 1] between images [N, 3, H, W] in [-1, 1]; 0 for identical ones."""
        with torch.autocast(a.device.type, enabled=False):
            distance: Tensor = self.network(a.float(), b.float())
        return distance


class FeatureExtractor(Frozen):
    """A network whose features are compared by metrics of sets.

    Args:
        network: Module that maps uint8 images to a tuple whose first entry is the features.
        name: Name of the features, for the protocol and for the feature cache.
        width: Number of features D.
        weights: File of the network's weights.
    """

    def __init__(self, network: nn.Module, name: str, width: int, weights: Path) -> None:
        super().__init__(network)
        self.name = name
        self.width = width
        self.weights = weights
        self.digest = sha256_once(weights)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features [N, D] of uint8 images [N, 3, H, W]; the network resizes the images itself."""
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self.network(images)[0]
        return features


class Inception(FeatureExtractor):
    """FID's Inception-v3 with its pool features; images are resized to 299 x 299 as TensorFlow does it."""

    def logits(self, pool: Tensor) -> Tensor:
        """Return the class logits [N, 1008] without bias, for the Inception Score, of pool features [N, 2048]."""
        return pool @ cast(nn.Linear, self.network.fc).weight.T


def available_trunks(folder: Path | None = None) -> list[Trunk]:
    """Return the LPIPS trunks whose weights are on this machine, AlexNet first."""
    return [trunk for trunk in SMALLEST_SIDE if is_available(trunk, folder)]


def load_extractor(name: Network, folder: Path | None, device: torch.device) -> FeatureExtractor:
    """Load the feature extractor of a pretrained network.

    Args:
        name: Name of the network.
        folder: Folder that is searched for weights before torch hub's.
        device: Device that runs the network.

    Raises:
        BadRequestError: The weights are missing, hold code, or have another layout.
        ValueError: The network has no feature extractor.
    """
    if name == "inception":
        return load_inception(folder, device)
    if name == "vgg":
        return load_vgg(folder, device)
    raise ValueError(f"{name} has no feature extractor")


def load_inception(folder: Path | None = None, device: torch.device | str = "cpu") -> Inception:
    """Load FID's Inception-v3 with its published weights: torch-fidelity's network, with equal features to a millionth.

    The batch normalisations are folded into the convolutions, and the weights are in channels-last format. On two CPU
    cores this is 1.6 times as fast as torch-fidelity's network.

    Args:
        folder: Folder that is searched for the weights before torch hub's.
        device: Device that runs the network.

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
    """Load VGG-16 with the features of its second hidden layer after the ReLU, as StyleGAN's precision and recall do.

    Args:
        folder: Folder that is searched for the weights before torch hub's.
        device: Device that runs the network.

    Raises:
        BadRequestError: The weights are missing, hold code, or have another layout.
    """
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

    path = find_weights("vgg", folder)
    # torchvision initialises the weights at random first, which must not change the caller's random stream.
    with _quiet(), _layout_of(path), torch.random.fork_rng(devices=[]):
        network = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=_copy(path))
    network.to(memory_format=torch.channels_last)
    return FeatureExtractor(network, "vgg16", 4096, path).to(device)


def load_lpips(trunk: Trunk, folder: Path | None = None, device: torch.device | str = "cpu") -> LPIPS:
    """Load LPIPS with torchvision's ImageNet weights as its trunk.

    Args:
        trunk: "vgg" (VGG-16, the perceptual loss of VQGAN and MoVQ) or "alex" (AlexNet, usual for evaluation).
        folder: Folder that is searched for the weights before torch hub's.
        device: Device that runs the network.

    Raises:
        BadRequestError: The weights are missing, hold code, or have another layout.
    """
    path = find_weights(trunk, folder)
    tensors = read_tensors(path)
    # lpips initialises the trunk at random first, which must not change the caller's random stream.
    with _quiet(), torch.random.fork_rng(devices=[]):
        import lpips

        network = lpips.LPIPS(net=trunk, pretrained=True, pnet_rand=True, verbose=False)
    # lpips cuts the trunk into slices. Put together again, the layers have torchvision's names.
    layers = OrderedDict(layer for part in network.net.children() for layer in part.named_children())
    features = nn.ModuleDict({"features": nn.Sequential(layers)})
    with _layout_of(path):
        # The classifier is not part of LPIPS. Any other tensor that is missing or unknown is an error.
        features.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("classifier.")})
    return LPIPS(network).to(device)


def untrained_lpips(trunk: Trunk, device: torch.device | str = "cpu") -> LPIPS:
    """Return LPIPS with random weights, which costs as much as the real one, to measure the time of training.

    Args:
        trunk: Name of the trunk, as for `load_lpips`.
        device: Device that runs the network.
    """
    with _quiet(), torch.device("meta"):
        import lpips

        network = lpips.LPIPS(net=trunk, pretrained=False, pnet_rand=True, verbose=False)
    network.to_empty(device=device)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4 and len(tensor) > 1:  # a convolution of the trunk
            nn.init.kaiming_normal_(tensor.data)
        else:
            nn.init.ones_(tensor.data)
    return LPIPS(network)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute without gradients and without TF32, which would change the fourth digit of the metrics."""
    # Decoding threads silence Pillow's warnings for each image. When two of them overlap, one restores the filters of
    # the other; catch_warnings around all of them restores the right ones in the end.
    with torch.inference_mode(), warnings.catch_warnings(), cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _copy(path: Path) -> io.BytesIO:
    """Return the weights as a file in memory.

    torch-fidelity unpickles any file that it is given, so it gets a copy of the tensors that were read safely.
    """
    copy = io.BytesIO()
    torch.save(read_tensors(path), copy)
    copy.seek(0)
    return copy


@contextmanager
def _layout_of(path: Path) -> Iterator[None]:
    """Raise an error that names the file if its tensors do not fit the network."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(": ")[2]
        raise unusable(path, f"it has another network's layout: {textwrap.shorten(reason, 200)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what the libraries print to stderr, and hide their deprecation warnings."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
