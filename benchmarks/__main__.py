"""Every benchmark once, each in a process of its own, and then the table of all.

    python -m benchmarks --device cpu                    all
    python -m benchmarks --device cuda sampling growth   some

One that fails, or that the time does not last for, stops none of the others; the exit code is 1 then, and its name is
said at the end. Peers that are not installed are skipped by name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import measure

NAMES = ("quantizer", "autoencoder", "training", "sampling", "loading", "evaluation", "growth")


def run(name: str, device: str, out: Path, options: list[str], limit: float | None) -> bool:
    """Run a benchmark for so many seconds at most, None = any; whether it ended well."""
    start = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", device, "--out", str(out), *options]
    print(f"\n=== {name}", flush=True)
    try:
        code = subprocess.run(command, check=False, timeout=limit).returncode
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
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of results")
    parser.add_argument("--taming", type=Path, help="a clone of CompVis/taming-transformers, a peer")
    arguments = parser.parse_args()
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    failed = []
    for name in arguments.names or NAMES:
        options = (
            ["--taming", str(arguments.taming)] if name in ("training", "autoencoder") and arguments.taming else []
        )
        limit = None if end is None else max(0.0, end - time.monotonic())
        if not run(name, arguments.device, arguments.out, options, limit):
            failed.append(name)
    print(flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.summary", "--out", str(arguments.out)], check=True)
    if failed:
        print(f"not done: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
