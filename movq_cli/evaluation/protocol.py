"""The protocol of a result: how its metrics were measured, and the published values to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from movq_cli import digests
from movq_cli.console import Console
from movq_cli.digests import NO_DIGEST
from movq_cli.evaluation import metrics, pretrained
from movq_cli.evaluation.metric import MetricValues
from movq_cli.evaluation.pretrained import Network
from movq_cli.files import atomic_write
from movq_cli.settings import Targets
from movq_cli.version import __version__

_LIBRARIES = ("torch", "torchvision", "torch-fidelity", "lpips", "pillow")


def conditions(device: torch.device) -> dict[str, Any]:
    """Return the part of a protocol that does not depend on the images.

    Args:
        device: Device that runs the networks.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "precision": "float32",
        "versions": {"movq": __version__} | {name: version(name) for name in _LIBRARIES},
    }


def describe_weights(networks: Iterable[Network], folder: Path | None, console: Console) -> dict[str, dict[str, str]]:
    """Return the file of weights of each network; warn of a file that is not the published one.

    Args:
        networks: Pretrained networks that were used.
        folder: Folder that is searched for weights before torch hub's.
        console: Console for warnings.
    """
    described: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(networks):
        path = pretrained.find_weights(name, folder)
        described[name] = pretrained.record(path)
        if not pretrained.is_published(path):
            console.warn(f"{path} is not the published file: its metrics cannot be compared with others")
    return described


def published_values(
    values: MetricValues, preset_name: str, targets: Targets, mode: str | None, *, reconstructed: bool
) -> dict[str, Any]:
    """Return the published values of the metrics that were computed, with their source.

    Args:
        values: The computed values.
        preset_name: Name of the preset.
        targets: Published values of the preset.
        mode: Mode of the prior that drew the fake images, from their manifest; None if they have none.
        reconstructed: Whether the fake images are reconstructions, which papers compare by other values than samples.
    """
    known = targets.of_reconstructions() if reconstructed else targets.of_samples(mode)
    published: dict[str, Any] = {"preset": preset_name, "source": targets.source}
    if mode is not None:
        published["mode"] = mode
    for key in values:
        metric = metrics.with_result_key(key)
        target = key if metric is None else metric.target_key(key, reconstructed=reconstructed)
        if target in known:
            published[key] = known[target]
    return published


def report(values: MetricValues, protocol: dict[str, Any], out: Path | None, console: Console) -> None:
    """Print the values with the published ones beside them, and write them to a file if one is named.

    Args:
        values: The computed values.
        protocol: Their protocol.
        out: JSON file; None writes none.
        console: Console for the result.

    Raises:
        FailureError: The file cannot be written.
    """
    result = {**values, "protocol": protocol}
    published = protocol.get("published")
    columns = ["metric", "value", *(["published"] if published else []), "variant"]
    rows = []
    for key, value in values.items():
        beside = [f"{published[key]:g}" if key in published else "-"] if published else []
        rows.append([key, "inf" if value is None else f"{value:.6g}", *beside, protocol["variants"][key]])
    console.table(result, columns, rows)
    if out is not None:
        text = json.dumps({"digest": NO_DIGEST, **result}, indent=2, allow_nan=False) + "\n"
        atomic_write(out, digests.with_digest(text.encode()))
