"""Every benchmark once, each in a process of its own, and then the table of all.

    python -m benchmarks --device cpu                    all
    python -m benchmarks --device cuda sampling growth   some

One that fails, or that the time does not last for, stops none of the others; the exit code is 1 then, and its name is
said at the end. Peers that are not installed are skipped by name. The first are those on which most depends.
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
    """Run Python with these arguments for so many seconds at most, None = any; whether it ended well."""
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
    """Run them, print the tables; 1 where one failed."""
    parser = argparse.ArgumentParser(description="Benchmarks, one after the other, and a table of all results.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all where none is given")
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, help="for all together; what is not done by then is left out")
    parser.add_argument("--tests", help="a file of tests that is run before them, in the same time")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of results")
    parser.add_argument("--taming", type=Path, help="a clone of CompVis/taming-transformers, a peer")
    arguments = parser.parse_args()
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    work = {"tests": ["-m", "pytest", "-n", "0", "-vv", arguments.tests]} if arguments.tests else {}
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
