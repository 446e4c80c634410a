"""Reading the configs that other projects publish beside their weights, YAML or JSON; nothing in them is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from movq_cli import strict_yaml
from movq_cli.errors import BadRequestError
from movq_cli.text_encoding import decode_text

_MAX_BYTES = 2**20

_BESIDE = ("{stem}.yaml", "{stem}.yml", "{stem}.json", "config.json", "config.yaml", "config.yml", "model.yaml")
"""Names of a config beside a weight file; the first one that exists is read."""


def names_beside(weights: str) -> list[str]:
    """Return the names that the config beside a weight file can have, of which the first one that exists is read.

    Args:
        weights: Name of the weight file.
    """
    return [name.format(stem=weights.partition(".")[0]) for name in _BESIDE]


def find(weights: Path) -> Path | None:
    """Return the path of the config beside a weight file; None if there is none."""
    paths = (weights.parent / name for name in names_beside(weights.name))
    return next((path for path in paths if path.is_file()), None)


def read(path: Path) -> Mapping[str, Any]:
    """Return the content of a config.

    Raises:
        BadRequestError: The file is missing, is not YAML or JSON with plain values, or does not hold settings by name.
    """
    try:
        if not path.is_file():
            raise BadRequestError(f"there is no config at {path}", "Name the file with --config, or omit the option.")
        if path.stat().st_size > _MAX_BYTES:
            raise BadRequestError(f"{path} is too large for a config", "Name another file with --config.")
        text = decode_text(path.read_bytes())
        values = json.loads(text) if path.suffix == ".json" else strict_yaml.load_plain(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadRequestError(
            f"{path} is not a config with plain values ({reason}); nothing in it was run",
            "Name another file with --config, or remove this one.",
        ) from None
    except OSError as error:
        raise BadRequestError(f"{path} cannot be read: {error.strerror}", "Name another file with --config.") from None
    if not isinstance(values, Mapping):
        raise BadRequestError(f"{path} does not hold settings by name", "Name another file with --config.")
    return values
