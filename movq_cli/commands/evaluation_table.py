"""`movq evaluate --table`: results side by side, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import cautions

_PLACES = {"psnr": 2, "fid": 2, "isc": 1, "codebook_perplexity": 0}
"""Decimals, as the field's tables have them; four for the rest."""


def tabulate(files: Sequence[str], console: Console) -> None:
    """Print a row for each result, and for each published row that stands beside one.

    Args:
        files: JSON files that `movq evaluate --out` wrote.
        console: Where the table goes; with `--json` the results by file.

    Raises:
        BadRequestError: A file is not such a result.
    """
    results = {file: _read(Path(file)) for file in files}
    keys = list(dict.fromkeys(key for result in results.values() for key in result if key != "protocol"))
    rows: list[tuple[str, dict[str, Any]]] = []
    for file, result in results.items():
        images = result["protocol"].get("fake", {}).get("images")
        rows.append((Path(file).stem, {"images": images} | result))
        published = result["protocol"].get("published")
        if published and (f"{published['preset']}, {published['source']}", published) not in rows:
            rows.append((f"{published['preset']}, {published['source']}", published))
    columns = ["images", *keys]
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, row in rows:
        lines.append(f"| {name} | {' | '.join(_spoken(key, row) for key in columns)} |")
    for line in _differences(results):
        console.warn(line)
    console.result(results, "\n".join(lines))


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result["protocol"], dict):
            raise TypeError("its protocol is no table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        remedy = "Make one with `movq evaluate REAL FAKE --out FILE`."
        raise BadRequestError(f"{path} is not a result of `movq evaluate` ({reason})", remedy) from None
    return dict(result)


def _spoken(key: str, row: dict[str, Any]) -> str:
    if key not in row:
        return "-"
    value = row[key]
    if value is None:
        return "-" if key == "images" else "inf"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{_PLACES.get(key, 4)}f}"


def _differences(results: dict[str, dict[str, Any]]) -> list[str]:
    """What keeps these results from being compared with each other."""
    by_condition: dict[str, dict[str, list[str]]] = {}
    for file, result in results.items():
        protocol = result["protocol"]
        real = protocol.get("real", {})
        conditions = {
            "the networks' weights": protocol.get("weights"),
            "the real images": real.get("sha256") or [real.get("images"), real.get("split"), real.get("prepared")],
            "the real images' crop": real.get("crop"),
            "the number of fake images": protocol.get("fake", {}).get("images"),
        }
        for name, value in conditions.items():
            by_condition.setdefault(name, {}).setdefault(json.dumps(value, sort_keys=True), []).append(file)
    return [
        f"not alike in {name}: {'; '.join(cautions.examples(files) for files in groups.values())}"
        for name, groups in by_condition.items()
        if len(groups) > 1
    ]
