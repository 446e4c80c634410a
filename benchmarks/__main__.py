"""Run every benchmark in a process of its own, and print a table of all results.

    python -m benchmarks --device cpu                    all benchmarks
    python -m benchmarks --device cuda sampling growth   only these

If a benchmark fails or runs out of time, the others run all the same; the exit code is then 1, and the last line names
the benchmark. Peers that are not installed are skipped, and the results name them. The most important benchmarks run
first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import measure

NAMES = ("training", "sampling", "quantizer", "evaluation", "loading", "autoencoder", "growth")


def run(name: str, arguments: list[str], limit: float | None) -> bool:
    """Run Python with these arguments for at most `limit` seconds (None: no limit); return whether it succeeded."""
    start = time.monotonic()
    print(f"\n=== {name}", flush=True)
    try:
        code = subprocess.run([sys.executable, *arguments], check=False, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        outcome = "out of time"
    else:
        outcome = "done" if code == 0 else f"failed, exit code {code}"
    print(f"=== {name}: {outcome}, {time.monotonic() - start:.0f} s", flush=True)
    return outcome == "done"


def main() -> int:
    """Run the benchmarks and print the tables; return the exit code, 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description="Benchmarks, one after the other, and a table of all results.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"benchmarks to run, of {', '.join(NAMES)} [default: all]"
    )
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument(
        "--minutes", type=float, help="time limit for all benchmarks together; what does not finish is left out"
    )
    parser.add_argument("--tests", help="a test file that runs before the benchmarks, within the same time limit")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of results")
    parser.add_argument("--taming", type=Path, help="a clone of CompVis/taming-transformers, a peer")
    arguments = parser.parse_args()
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    work = {"tests": ["-m", "pytest", "-n", "4", "-vv", arguments.tests]} if arguments.tests else {}
    for name in arguments.names or NAMES:
        options = ["--device", arguments.device, "--out", str(arguments.out)]
        if name in ("training", "autoencoder") and arguments.taming:
            options += ["--taming", str(arguments.taming)]
        work[name] = ["-m", f"benchmarks.{name}", *options]
    failed = []
    for name, command in work.items():
        limit = None if end is None else max(0.0, end - time.monotonic())
        if not run(name, command, limit):
            failed.append(name)
    print(flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.summary", "--out", str(arguments.out)], check=True)
    if failed:
        print(f"not done: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
