"""The pretrained networks that judge images, and where their weights are.

Weights are looked for in a folder of the user's, then in torch hub's, then downloaded into the latter. They
are only ever read as tables of tensors: no file gets to run code.
"""

from __future__ import annotations

import http.client
import io
import socket
import sys
import textwrap
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from movq_cli.errors import BadRequestError
from movq_cli.metrics.distributions import FeatureStatistics

Network = Literal["inception", "vgg", "alex"]
Trunk = Literal["vgg", "alex"]

INCEPTION = "inception-v3-compat"
"""torch-fidelity's name for the TensorFlow network of 2015 with TensorFlow's resizing: FID's convention."""

INCEPTION_WIDTH = 2048
INCEPTION_CLASSES = 1008

SMALLEST_SIDE: Mapping[Trunk, int] = {"alex": 31, "vgg": 16}
"""Pixels a side below which a trunk's pooling leaves nothing."""

_SECONDS_TO_ANSWER = 20.0


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights; the start of its SHA-256 ends its name."""

    file: str
    megabytes: int  # 10^6 bytes
    url: str
    purpose: str

    @property
    def sha256_prefix(self) -> str:
        """The first 8 hexadecimal digits of the published file's SHA-256."""
        return Path(self.file).stem.rpartition("-")[2]


WEIGHTS: dict[Network, WeightsFile] = {
    "inception": WeightsFile(
        "weights-inception-2015-12-05-6726825d.pth",
        96,
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "FID, IS, KID, precision and recall",
    ),
    "vgg": WeightsFile(
        "vgg16-397923af.pth",
        553,
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "LPIPS with the VGG trunk, the perceptual loss of training",
    ),
    "alex": WeightsFile(
        "alexnet-owt-7be5be79.pth",
        244,
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "LPIPS with the AlexNet trunk",
    ),
}


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


class Inception(Frozen):
    """FID's Inception-v3, with TensorFlow's resizing to 299 x 299 inside."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pool features [N, 2048] and logits without their bias [N, 1008], of uint8 images [N, 3, H, W]."""
        with torch.autocast(images.device.type, enabled=False):
            pool, logits = self.network(images)
        return pool, logits


class Features(NamedTuple):
    """What Inception sees in a set of N images."""

    statistics: FeatureStatistics
    pool: Tensor  # [N, 2048] float32 on the CPU; empty where not kept
    logits: Tensor  # [N, 1008] likewise


class Reference(NamedTuple):
    """Statistics in place of real images, as guided-diffusion publishes them."""

    path: Path
    mu: Tensor  # [2048] float64
    sigma: Tensor  # [2048, 2048]


def read_reference(path: Path) -> Reference:
    """Read the statistics of Inception's pool features from an .npz that holds `mu` and `sigma`.

    Raises:
        BadRequestError: The file cannot be read, or holds something else.
    """
    width = INCEPTION_WIDTH
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise BadRequestError(f"{path} holds no statistics ({error})", "It must hold `mu` and `sigma`.") from error
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise BadRequestError(f"{path}: mu and sigma must be of {width} features, not {list(sigma.shape)}")
    return Reference(path, mu, sigma)


def collect_features(
    network: Inception,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    keep: Container[str] = ("pool", "logits"),
) -> Features:
    """Run a stream of images through Inception, in memory that does not grow but for what is kept.

    Args:
        network: On `device`.
        batches: Each image's place in the set [B] and uint8 images [B, 3, H, W].
        device: Where the network runs.
        keep: "pool" for KID, precision and recall; "logits" for IS; FID needs neither.

    Returns:
        Features in the order of the places, whatever the order in which the batches came.
    """
    # float64 is a GPU's business where that is CUDA; others have none.
    statistics = FeatureStatistics(INCEPTION_WIDTH, device if device.type == "cuda" else "cpu")
    places = [torch.empty(0, dtype=torch.int64)]
    pools, logits = [torch.empty(0, INCEPTION_WIDTH)], [torch.empty(0, INCEPTION_CLASSES)]
    for place, images in batches:
        pool, logit = network(images.to(device))
        statistics.update(pool)
        places.append(place)
        if "pool" in keep:
            pools.append(pool.cpu())
        if "logits" in keep:
            logits.append(logit.cpu())
    order = torch.cat(places).argsort()
    kept = [torch.cat(parts)[order] if len(parts) > 1 else parts[0] for parts in (pools, logits)]
    return Features(statistics, kept[0], kept[1])


def is_here(name: Network, folder: Path | None = None) -> bool:
    """Whether a network's weights are on this machine."""
    return _look(WEIGHTS[name], _places(folder)) is not None


def trunks_here(folder: Path | None = None) -> list[Trunk]:
    """The LPIPS trunks whose weights are on this machine, AlexNet first."""
    return [trunk for trunk in SMALLEST_SIDE if is_here(trunk, folder)]


def find_weights(name: Network, folder: Path | None = None, *, download: bool = True) -> Path:
    """Where a network's weights are: the folder, then torch hub's, then downloaded into torch hub's.

    Args:
        name: A key of `WEIGHTS`.
        folder: The user's folder of weights, searched first.
        download: Fetch the file where it is in neither.

    Raises:
        BadRequestError: The folder does not exist, or the file is nowhere and cannot be fetched.
    """
    wanted = WEIGHTS[name]
    places = _places(folder)
    found = _look(wanted, places)
    if found is not None:
        return found
    message = f"no weights {wanted.file} ({wanted.megabytes} MB, for {wanted.purpose}) in "
    message += " or ".join(str(place) for place in places)
    if download:
        fault = _fetch(wanted, places[-1])
        if fault is None:
            return places[-1] / wanted.file
        message += f", and downloading them failed: {fault}"
    remedy = f"Get them from {wanted.url}, and put them there or in a folder named with --weights."
    raise BadRequestError(message, remedy)


def load_inception(folder: Path | None = None, device: torch.device | str = "cpu") -> Inception:
    """FID's Inception-v3 with its published weights.

    Args:
        folder: Searched for the weights before torch hub's folder.
        device: Where the network runs.

    Raises:
        BadRequestError: The weights are missing, hold code, or have another layout.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = find_weights("inception", folder)
    # torch-fidelity unpickles whatever its path holds: it gets our own copy of the tensors, not the file.
    copy = io.BytesIO()
    torch.save(_read_tensors(path), copy)
    copy.seek(0)
    with _quiet(), _layout_of(path):
        network = FeatureExtractorInceptionV3(
            INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
        )
    return Inception(network).to(device)


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
    tensors = _read_tensors(path)
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


def _places(folder: Path | None) -> list[Path]:
    if folder is not None and not folder.is_dir():
        raise BadRequestError(f"there is no folder of weights at {folder}")
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [hub] if folder is None else [folder, hub]


def _look(wanted: WeightsFile, places: Iterable[Path]) -> Path | None:
    return next((place / wanted.file for place in places if (place / wanted.file).is_file()), None)


def _fetch(wanted: WeightsFile, hub: Path) -> str | None:
    """Download into torch hub's folder, checked against its hash; the reason where that fails."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS_TO_ANSWER)
    try:
        hub.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr):
            torch.hub.download_url_to_file(
                wanted.url, str(hub / wanted.file), hash_prefix=wanted.sha256_prefix, progress=False
            )
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        return str(error) or type(error).__name__
    finally:
        socket.setdefaulttimeout(patience)
    return None


def _read_tensors(path: Path) -> dict[str, Any]:
    """A state dict, read without running anything that the file may hold."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged pickle can fail in any way at all, and each means the same to the user.
        raise _unusable(path, "damaged, or it holds code, which is not run") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise _unusable(path, "it is not a table of tensors")
    return tensors


@contextmanager
def _layout_of(path: Path) -> Iterator[None]:
    """Name the file where its tensors are not those of the network."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(": ")[2]
        raise _unusable(path, f"another network's layout: {textwrap.shorten(reason, 200)}") from error


def _unusable(path: Path, reason: str) -> BadRequestError:
    source = next((known.url for known in WEIGHTS.values() if known.file == path.name), "its source")
    return BadRequestError(f"cannot use the weights {path}: {reason}", f"Get the file again from {source}.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the libraries print off stdout, and their deprecation notices to themselves."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
