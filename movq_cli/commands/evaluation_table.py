"""`movq evaluate --table`: several results side by side, as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from movq_cli import digests
from movq_cli.console import Console
from movq_cli.data.output_files import RESULT, refuse_foreign
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import cautions, codebook, metrics
from movq_cli.evaluation.metric import DEFAULT_DECIMALS
from movq_cli.files import atomic_write


def tabulate(files: Sequence[str], console: Console, out: Path | None = None) -> None:
    """Print a row for each result, and one for each set of published values that a result is compared with.

    Args:
        files: JSON files that `movq evaluate --out` wrote.
        console: Console for the table; with `--json` it prints the results by file.
        out: File to which the results by file are written as JSON; None = none.

    Raises:
        BadRequestError: A file is not such a result, or `out` is one of them, a folder, or a file that
            movq did not write.
        FailureError: `out` could not be written.
    """
    if out is not None and (out.is_dir() or out.resolve() in {Path(file).resolve() for file in files}):
        reason = "is a folder" if out.is_dir() else "is one of the results, which it would replace"
        raise BadRequestError(f"{out} {reason}", "--out names the JSON file to write.")
    if out is not None:
        refuse_foreign(out, RESULT)
    results = {file: _read(Path(file)) for file in files}
    keys = list(dict.fromkeys(key for result in results.values() for key in result if key != "protocol"))
    rows: list[tuple[str, dict[str, Any]]] = []
    for file, result in results.items():
        images = result["protocol"].get("fake", {}).get("images")
        rows.append((Path(file).stem, {"images": images} | result))
        published = result["protocol"].get("published")
        if published and any(key in published for key in keys):  # The paper plots some rows without giving numbers.
            parts = [str(published[key]) for key in ("preset", "mode") if key in published]
            name = f"{' '.join(parts)}, {published['source']}"
            if (name, published) not in rows:
                rows.append((name, published))
    columns = ["images", *keys]
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, row in rows:
        lines.append(f"| {name} | {' | '.join(_format(key, row) for key in columns)} |")
    for line in _differences(results):
        console.warn(line)
    if out is not None:
        atomic_write(out, f"{json.dumps(results, indent=1)}\n".encode())
    console.result(results, "\n".join(lines))


def _read(path: Path) -> dict[str, Any]:
    remedy = "Make one with `movq evaluate REAL FAKE --out FILE`."
    try:
        result = json.loads(digests.read_json(path, remedy)[0])
        if not isinstance(result["protocol"], dict):
            raise TypeError("its protocol is not an object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise BadRequestError(f"{path} is not a result of `movq evaluate` ({reason})", remedy) from None
    return {name: value for name, value in result.items() if name != "digest"}


def _format(key: str, row: dict[str, Any]) -> str:
    """Return a table cell: a dash for a missing value, "inf" for the infinite mean of identical pairs."""
    if key not in row:
        return "-"
    value = row[key]
    if value is None:
        return "-" if key == "images" else "inf"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{_decimals(key)}f}"


def _decimals(key: str) -> int:
    metric = metrics.with_result_key(key)
    return codebook.DECIMALS.get(key, DEFAULT_DECIMALS) if metric is None else metric.decimals


def _differences(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each condition that differs between the results, so that they cannot be compared."""
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
        f"these results differ in {name}: {'; '.join(cautions.examples(files) for files in groups.values())}"
        for name, groups in by_condition.items()
        if len(groups) > 1
    ]
