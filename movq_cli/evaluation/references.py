"""Statistics in place of real images: an .npz file, or a name under which `movq evaluate --stats` stored one."""

from __future__ import annotations

from pathlib import Path

from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import extractors, feature_cache
from movq_cli.evaluation.extractors import FeatureExtractor
from movq_cli.evaluation.feature_cache import Reference
from movq_cli.evaluation.pretrained import Network
from movq_cli.sources.arrays import npz_arrays

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
    elif path.suffix != ".npz" or npz_arrays(path) & {"arr_0", "mu"} == {"arr_0"}:
        return None
    reference, width = feature_cache.read_reference(path), extractors.INCEPTION_WIDTH
    if len(reference.mu) != width:
        raise BadRequestError(f"{path} holds statistics of {len(reference.mu)} features, not of Inception's {width}")
    return reference


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
