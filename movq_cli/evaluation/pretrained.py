"""The weights of the pretrained networks: a search for their files, their download, and a reader that runs no code.

Files are searched in the user's folder, then in torch hub's. Missing files are downloaded into torch hub's folder.
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
from movq_cli.files import sha256_once

Network = Literal["inception", "vgg", "alex"]

_DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer of the server


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights, whose name ends with the first digits of its SHA-256."""

    file: str  # name of the file
    megabytes: int  # size in 10^6 bytes
    url: str  # address of the publisher
    purpose: str  # what the network is used for

    @property
    def sha256_prefix(self) -> str:
        """The first 8 hexadecimal digits of the published file's SHA-256."""
        return Path(self.file).stem.rpartition("-")[2]


WEIGHTS: dict[Network, WeightsFile] = {
    "inception": WeightsFile(
        "weights-inception-2015-12-05-6726825d.pth",
        96,
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "FID and the other metrics of Inception features",
    ),
    "vgg": WeightsFile(
        "vgg16-397923af.pth",
        553,
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "the perceptual loss of training, LPIPS with the VGG trunk, metrics of VGG-16 features",
    ),
    "alex": WeightsFile(
        "alexnet-owt-7be5be79.pth",
        244,
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "LPIPS with the AlexNet trunk",
    ),
}


def is_available(name: Network, folder: Path | None = None) -> bool:
    """Return whether a network's weights are on this machine.

    Args:
        name: Name of the network.
        folder: Folder that is searched before torch hub's.
    """
    return _find_file(WEIGHTS[name], search_folders(folder)) is not None


def find_weights(name: Network, folder: Path | None = None, *, download: bool = True) -> Path:
    """Return the file of a network's weights, downloaded into torch hub's folder if it is missing.

    Args:
        name: Name of the network.
        folder: Folder that is searched before torch hub's.
        download: Whether to download a missing file.

    Raises:
        BadRequestError: The folder does not exist, or the file is missing and was not or could not be downloaded.
    """
    known = WEIGHTS[name]
    folders = search_folders(folder)
    found = _find_file(known, folders)
    if found is not None:
        return found
    message = f"no weights {known.file} ({known.megabytes} MB, for {known.purpose}) in "
    message += " or ".join(map(str, folders))
    if download:
        problem = _download(known, folders[-1])
        if problem is None:
            return folders[-1] / known.file
        message += f", and downloading them failed: {problem}"
    remedy = f"Get them from {known.url}, and put them there or in a folder named with --weights."
    raise BadRequestError(message, remedy)


def download(name: Network, folder: Path | None = None) -> Path:
    """Download a network's weights into a folder, unless the folder has them already.

    Args:
        name: Name of the network.
        folder: Folder for the file, which is created if it is missing; None uses torch hub's.

    Raises:
        FailureError: The file cannot be downloaded.
    """
    known = WEIGHTS[name]
    target = folder or search_folders(None)[0]
    problem = None if _find_file(known, [target]) else _download(known, target)
    if problem is not None:
        raise FailureError(f"cannot download {known.file}: {problem}", f"Get it from {known.url}.")
    return target / known.file


def record(path: Path) -> dict[str, str]:
    """Return the entry of a file of weights in a protocol."""
    return {"file": path.name, "sha256": sha256_once(path)}


def is_published(path: Path) -> bool:
    """Return whether a file of weights is the published one, by its hash."""
    known = next(known for known in WEIGHTS.values() if known.file == path.name)
    return sha256_once(path).startswith(known.sha256_prefix)


def search_folders(folder: Path | None) -> list[Path]:
    """Return the folders that are searched for weights, in order.

    Args:
        folder: Folder of the user, searched first; None searches torch hub's alone.

    Raises:
        BadRequestError: The user's folder does not exist.
    """
    if folder is not None and not folder.is_dir():
        raise BadRequestError(f"there is no folder of weights at {folder}")
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [hub] if folder is None else [folder, hub]


def _find_file(known: WeightsFile, folders: Iterable[Path]) -> Path | None:
    return next((folder / known.file for folder in folders if (folder / known.file).is_file()), None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code in the file.

    Raises:
        BadRequestError: The file is damaged, holds code, or is not a table of tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged pickle can raise any exception, and all of them mean the same to the user.
        raise unusable(path, "damaged, or it holds code, which is not run") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise unusable(path, "it is not a table of tensors")
    return tensors


def unusable(path: Path, reason: str) -> BadRequestError:
    """Return the error of a file of weights that cannot be used, with the address of a good one.

    Args:
        path: The file.
        reason: What is wrong with it.
    """
    source = next((known.url for known in WEIGHTS.values() if known.file == path.name), "its source")
    return BadRequestError(f"cannot use the weights {path}: {reason}", f"Get the file again from {source}.")


def _download(known: WeightsFile, folder: Path) -> str | None:
    """Download a file into a folder and check its hash; return the reason if that fails."""
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = str(folder / known.file)
        with redirect_stdout(sys.stderr):
            torch.hub.download_url_to_file(
                known.url, target, hash_prefix=known.sha256_prefix, progress=sys.stderr.isatty()
            )
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        return str(error) or type(error).__name__
    finally:
        socket.setdefaulttimeout(previous_timeout)
    return None
