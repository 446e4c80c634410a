"""Print all results in tables: growth of the cost, speed compared with the peers, and with the limit of the device.

    python -m benchmarks.summary                the results in benchmarks/results
    python -m benchmarks.summary --markdown     as Markdown

A result is a file `<benchmark>-<device>.json`. Each of its `rows` has a `name` and `seconds`, and where they are known
`precision`, `peer_over_this` (the time of the peer over this time; 1 for the peer itself), `floor_seconds` and
`memory_bytes`. `machine` has the machine and the date. The result of the growth benchmark has `curves` in place of
`rows`.
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
    """The results of one benchmark on one machine."""

    benchmark: str
    figures: dict[str, Any]

    @property
    def device(self) -> str:
        """Name of the GPU, or of the processor with its number of cores."""
        machine = self.figures["machine"]
        return machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"

    @property
    def place(self) -> tuple[str, str]:
        """Device and date of the measurement."""
        return self.device, self.figures["machine"]["date"]

    @property
    def origin(self) -> str:
        """One line with the device, the versions and the peer."""
        machine, peer = self.figures["machine"], self.figures.get("peer")
        versions = f"{self.benchmark}: {self.device}, Python {machine['python']}, torch {machine['torch']}"
        return versions if peer is None else f"{versions}; peer: {peer}"


def read(folder: Path) -> list[Result]:
    """Return the results in a folder, sorted by name; files with another layout are skipped."""
    results = []
    for path in sorted(folder.glob("*-*.json")):
        figures = json.loads(path.read_text())
        benchmark, _, device = path.stem.rpartition("-")
        if device in ("cpu", "cuda") and "machine" in figures:
            results.append(Result(benchmark, figures))
    return results


def timed(results: Sequence[Result], key: str) -> Iterator[tuple[Result, dict[str, Any], str]]:
    """Yield the rows that have a value for `key`, with their names; the rows of peers are skipped."""
    for result in results:
        for row in result.figures.get("rows", ()):
            if row.get(key) is not None and row.get("peer_over_this") != 1:
                yield result, row, f"{row['name']} {row.get('precision', '')}".strip()


def ratios(results: Sequence[Result]) -> Rows:
    """Return the table of speed compared with the peers."""
    rows: list[tuple[str, ...]] = []
    for result, row, name in timed(results, "peer_over_this"):
        seconds, ratio, _, _, memory = measure.cells(row)
        rows.append((result.benchmark, name, seconds, ratio, memory, *result.place))
    return rows


def floors(results: Sequence[Result]) -> Rows:
    """Return the table of speed compared with the limit of the device."""
    rows: list[tuple[str, ...]] = []
    for result, row, name in timed(results, "floor_seconds"):
        seconds, _, floor, share, _ = measure.cells(row)
        rows.append((result.benchmark, name, seconds, floor, share, *result.place))
    return rows


def growth(results: Sequence[Result]) -> Rows:
    """Return the table of growth."""
    return [
        (*measure.growth_cells(curve), *result.place)
        for result in results
        for curve in result.figures.get("curves", ())
    ]


def show(title: str, headings: Sequence[str], rows: Rows, *, markdown: bool) -> None:
    """Print a table, as text or as Markdown."""
    if markdown:
        print(f"\n| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
        return
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=measure.WIDTH).print(table)


def main() -> None:
    """Read the results and print the tables."""
    parser = argparse.ArgumentParser(description="Print all results as tables.")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of results")
    parser.add_argument("--markdown", action="store_true", help="as Markdown")
    arguments = parser.parse_args()
    results = read(arguments.out)
    for title, headings, rows in (
        ("growth", GROWTH, growth(results)),
        ("compared with the peers", RATIOS, ratios(results)),
        ("compared with the limit of the device", FLOORS, floors(results)),
    ):
        if rows:
            show(title, headings, rows, markdown=arguments.markdown)
    print()
    for result in results:
        print(f"- {result.origin}" if arguments.markdown else result.origin)


if __name__ == "__main__":
    main()
