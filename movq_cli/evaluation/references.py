"""Statistics in place of real images: an .npz file, or a name under which `movq evaluate --stats` stored one."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from movq_cli.console import Console
from movq_cli.data.array_files import UNREADABLE_ZIP, member_blocks, member_header, reason_of
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import extractors, feature_cache
from movq_cli.evaluation.extractors import FeatureExtractor
from movq_cli.evaluation.feature_cache import Reference
from movq_cli.evaluation.pretrained import Network
from movq_cli.sources.arrays import npz_arrays

_ARRAYS = {"mu": 1, "sigma": 2, "protocol": 0}
"""Names of the arrays that are read, with their number of dimensions."""

_MAX_PROTOCOL_BYTES = 2**24
_SHOWN_ARRAYS = 8
_REMEDY = "It must hold `mu` and `sigma` of Inception's features, as `movq evaluate --stats` stores them."

NETWORK: Network = "inception"
"""The network whose features the statistics describe."""


def statistics_path(name: str, cache: Path) -> Path:
    """Return the file of statistics that are stored under a name.

    Args:
        name: Name of the statistics.
        cache: Folder of the cache.
    """
    return cache / "statistics" / f"{Path(name).name}.npz"


def find_reference(location: str, cache: Path) -> Reference | None:
    """Read the statistics that a location names; return None if it names images alone.

    Args:
        location: Path of an .npz file, or the name of stored statistics.
        cache: Folder of the cache.

    Raises:
        BadRequestError: The file cannot be read, or its statistics are not of Inception's features.
    """
    path = Path(location)
    if not path.exists() and statistics_path(location, cache).is_file():
        path = statistics_path(location, cache)
    elif path.suffix != ".npz":
        return None
    else:
        arrays = npz_arrays(path)
        if arrays & {"arr_0", "mu"} == {"arr_0"}:
            return None
        if arrays and not arrays & {"arr_0", "mu", "sigma"}:
            raise BadRequestError(
                f"{path} holds the arrays {', '.join(sorted(arrays)[:_SHOWN_ARRAYS])}: neither images nor statistics",
                "Images are the array arr_0 of numpy.savez(FILE, images), uint8 [N, H, W, 3]; statistics are mu and "
                "sigma.",
            )
    _check_file(path)
    reference = feature_cache.read_reference(path)
    if not (reference.mu.isfinite().all() and reference.sigma.isfinite().all()):
        raise BadRequestError(f"{path} holds no statistics (mu and sigma have values that are not finite)", _REMEDY)
    return reference._replace(protocol=_plain_protocol(reference.protocol))


def _check_file(path: Path) -> None:
    """Refuse a file whose arrays are not statistics of Inception's features, before memory is taken for them.

    Raises:
        BadRequestError: The file is damaged, or its arrays have other shapes or types.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.removesuffix(".npy") in _ARRAYS:
                    _check_array(path, archive, info)
            for name in ("mu", "sigma"):
                member_header(archive, name)
    except UNREADABLE_ZIP as error:
        raise BadRequestError(f"{path} holds no statistics ({reason_of(error)})", _REMEDY) from None
    except KeyError as error:
        raise BadRequestError(f"{path} holds no statistics ({error.args[0]})", _REMEDY) from None


def _check_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Check the header of an array, and then its bytes against its checksum, a block at a time."""
    name, width = info.filename.removesuffix(".npy"), extractors.INCEPTION_WIDTH
    header = member_header(archive, name)
    if name == "protocol":
        is_expected = header.shape == () and header.dtype.kind == "U" and header.size <= _MAX_PROTOCOL_BYTES
    else:
        is_expected = header.shape == (width,) * _ARRAYS[name] and header.dtype.kind in "iuf"
        if header.shape != (width,) and name == "mu" and len(header.shape) == 1:
            message = f"{path} holds statistics of {header.shape[0]} features, not of Inception's {width}"
            raise BadRequestError(message, _REMEDY)
    if not is_expected:
        raise BadRequestError(f"{path} holds no statistics ({name} is {header})", _REMEDY)
    size = sum(map(len, member_blocks(archive, info)))
    if size < header.start + header.size:
        raise EOFError(f"{name} is truncated")


def _plain_protocol(protocol: Any) -> dict[str, Any]:  # noqa: ANN401 - what JSON holds
    """Return the protocol if it has the structure that is read here; empty otherwise, as if the file had none."""
    weights = protocol.get("weights", {}) if isinstance(protocol, dict) else None
    is_known = isinstance(weights, dict) and all(isinstance(network, dict) for network in weights.values())
    return protocol if is_known else {}


def has_images(reference: Reference) -> bool:
    """Return whether a file of statistics also holds the images, as guided-diffusion's reference batches do."""
    return "arr_0" in npz_arrays(reference.path)


def warn_of_other_weights(reference: Reference, network: FeatureExtractor, console: Console) -> None:
    """Warn if the statistics were made with other weights than the network has."""
    digest = reference.protocol.get("weights", {}).get(NETWORK, {}).get("sha256", network.digest)
    if digest != network.digest:
        console.warn(
            f"{reference.path} was made with other weights of Inception: this FID cannot be compared with other FIDs"
        )
