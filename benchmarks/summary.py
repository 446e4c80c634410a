"""All results in two tables: how much faster than the peers, and how far from the device's limit.

    python -m benchmarks.summary                the files in benchmarks/results
    python -m benchmarks.summary --markdown     as the README has them

A result is a `<benchmark>-<device>.json`. Of its `rows` each has a `name` and `seconds`, and where they are known
`precision`, `peer_over_this` (the peer's time over this one's; 1 = the peer itself), `floor_seconds` and
`memory_bytes`; `machine` says where and when. Of growth, `curves` has what it printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import measure

RATIOS = ("benchmark", "work", "s", "peer / this", "GiB", "device", "date")
FLOORS = ("benchmark", "work", "s", "floor, s", "of the floor", "device", "date")
GROWTH = ("work", "time grows with", "memory with", "of the largest size most time goes to", "device", "date")

Rows = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Result:
    """One benchmark's figures on one machine."""

    benchmark: str
    figures: dict[str, Any]

    @property
    def device(self) -> str:
        """The GPU, or the processor with its cores."""
        machine = self.figures["machine"]
        return machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"

    @property
    def place(self) -> tuple[str, str]:
        """Device and date."""
        return self.device, self.figures["machine"]["date"]

    @property
    def origin(self) -> str:
        """Versions and peer, in a line."""
        machine, peer = self.figures["machine"], self.figures.get("peer")
        versions = f"{self.benchmark}: {self.device}, Python {machine['python']}, torch {machine['torch']}"
        return versions if peer is None else f"{versions}; peer: {peer}"


def read(folder: Path) -> list[Result]:
    """The results in a folder, by name; files of other layouts are left out."""
    results = []
    for path in sorted(folder.glob("*-*.json")):
        figures = json.loads(path.read_text())
        benchmark, _, device = path.stem.rpartition("-")
        if device in ("cpu", "cuda") and "machine" in figures:
            results.append(Result(benchmark, figures))
    return results


def timed(results: Sequence[Result], key: str) -> Iterator[tuple[Result, dict[str, Any], str]]:
    """The rows that have a figure, with their names; rows of peers are left out."""
    for result in results:
        for row in result.figures.get("rows", ()):
            if row.get(key) is not None and row.get("peer_over_this") != 1:
                yield result, row, f"{row['name']} {row.get('precision', '')}".strip()


def ratios(results: Sequence[Result]) -> Rows:
    """The first table."""
    rows: list[tuple[str, ...]] = []
    for result, row, name in timed(results, "peer_over_this"):
        seconds, ratio, _, _, memory = measure.cells(row)
        rows.append((result.benchmark, name, seconds, ratio, memory, *result.place))
    return rows


def floors(results: Sequence[Result]) -> Rows:
    """The second table."""
    rows: list[tuple[str, ...]] = []
    for result, row, name in timed(results, "floor_seconds"):
        seconds, _, floor, share, _ = measure.cells(row)
        rows.append((result.benchmark, name, seconds, floor, share, *result.place))
    return rows


def growth(results: Sequence[Result]) -> Rows:
    """The third table."""
    return [
        (*measure.growth_cells(curve), *result.place)
        for result in results
        for curve in result.figures.get("curves", ())
    ]


def show(title: str, headings: Sequence[str], rows: Rows, *, markdown: bool) -> None:
    """Print a table, for people or for the README."""
    if markdown:
        print(f"\n| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
        return
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=measure.WIDTH).print(table)


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description="All results in two tables.")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of results")
    parser.add_argument("--markdown", action="store_true", help="as Markdown")
    arguments = parser.parse_args()
    results = read(arguments.out)
    for title, headings, rows in (
        ("growth", GROWTH, growth(results)),
        ("beside the peers", RATIOS, ratios(results)),
        ("beside the device's limit", FLOORS, floors(results)),
    ):
        if rows:
            show(title, headings, rows, markdown=arguments.markdown)
    print()
    for result in results:
        print(f"- {result.origin}" if arguments.markdown else result.origin)


if __name__ == "__main__":
    main()
