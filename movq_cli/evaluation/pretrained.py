"""Where the weights of the pretrained networks are: a folder of the user's, torch hub's, or their publishers'.

They are looked for in that order, and downloaded into torch hub's folder. They are only ever read as tables of
tensors: no file gets to run code.
"""

from __future__ import annotations

import http.client
import socket
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import sha256

Network = Literal["inception", "vgg", "alex"]

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
        "the perceptual loss of training, LPIPS with the VGG trunk, precision and recall in StyleGAN's convention",
    ),
    "alex": WeightsFile(
        "alexnet-owt-7be5be79.pth",
        244,
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "LPIPS with the AlexNet trunk",
    ),
}


def is_available(name: Network, folder: Path | None = None) -> bool:
    """Whether a network's weights are on this machine."""
    return _look(WEIGHTS[name], search_folders(folder)) is not None


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
    places = search_folders(folder)
    found = _look(wanted, places)
    if found is not None:
        return found
    message = f"no weights {wanted.file} ({wanted.megabytes} MB, for {wanted.purpose}) in "
    message += " or ".join(str(place) for place in places)
    if download:
        fault = _download(wanted, places[-1])
        if fault is None:
            return places[-1] / wanted.file
        message += f", and downloading them failed: {fault}"
    remedy = f"Get them from {wanted.url}, and put them there or in a folder named with --weights."
    raise BadRequestError(message, remedy)


def download(name: Network, folder: Path | None = None) -> Path:
    """Download a network's weights, unless they are in that very folder already.

    Args:
        name: A key of `WEIGHTS`.
        folder: Where they shall be, made where it is missing; None = torch hub's.

    Raises:
        FailureError: They cannot be downloaded.
    """
    wanted = WEIGHTS[name]
    place = folder or search_folders(None)[0]
    fault = None if _look(wanted, [place]) else _download(wanted, place)
    if fault is not None:
        raise FailureError(f"cannot download {wanted.file}: {fault}", f"Get it from {wanted.url}.")
    return place / wanted.file


def record(path: Path) -> dict[str, str]:
    """What a protocol says of a file of weights."""
    return {"file": path.name, "sha256": sha256(path)}


def is_published(path: Path) -> bool:
    """Whether a file of weights is the published one, by its hash."""
    return sha256(path).startswith(next(known.sha256_prefix for known in WEIGHTS.values() if known.file == path.name))


def search_folders(folder: Path | None) -> list[Path]:
    """The folders in which weights are looked for, in order.

    Raises:
        BadRequestError: The user's folder does not exist.
    """
    if folder is not None and not folder.is_dir():
        raise BadRequestError(f"there is no folder of weights at {folder}")
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [hub] if folder is None else [folder, hub]


def _look(wanted: WeightsFile, places: Iterable[Path]) -> Path | None:
    return next((place / wanted.file for place in places if (place / wanted.file).is_file()), None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict, read without running anything that the file may hold.

    Raises:
        BadRequestError: It is damaged, holds code, or is no table of tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged pickle can fail in any way at all, and each means the same to the user.
        raise unusable(path, "damaged, or it holds code, which is not run") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise unusable(path, "it is not a table of tensors")
    return tensors


def unusable(path: Path, reason: str) -> BadRequestError:
    """The error of a weight file that cannot be used, with where to get it again."""
    source = next((known.url for known in WEIGHTS.values() if known.file == path.name), "its source")
    return BadRequestError(f"cannot use the weights {path}: {reason}", f"Get the file again from {source}.")


def _download(wanted: WeightsFile, folder: Path) -> str | None:
    """Download into a folder, checked against the hash; the reason where that fails."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS_TO_ANSWER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = str(folder / wanted.file)
        with redirect_stdout(sys.stderr):
            torch.hub.download_url_to_file(
                wanted.url, target, hash_prefix=wanted.sha256_prefix, progress=sys.stderr.isatty()
            )
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        return str(error) or type(error).__name__
    finally:
        socket.setdefaulttimeout(patience)
    return None
