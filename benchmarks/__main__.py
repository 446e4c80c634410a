"""Every benchmark once, each in a process of its own, and then the table of all.

    python -m benchmarks --device cpu

One that fails stops none of the others; the exit code is 1 then, and its name is said at the end. Peers that are not
installed are skipped by name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import measure

NAMES = ("quantizer", "autoencoder", "training", "sampling", "loading", "evaluation", "growth")


def run(name: str, device: str, out: Path, options: list[str]) -> bool:
    """Run a benchmark; whether it ended well."""
    start = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", device, "--out", str(out), *options]
    print(f"\n=== {name}", flush=True)
    code = subprocess.run(command, check=False).returncode
    print(f"=== {name}: {'done' if code == 0 else f'failed, exit code {code}'}, {time.monotonic() - start:.0f} s")
    return code == 0


def main() -> int:
    """Run them all, print the tables; 1 where one failed."""
    parser = argparse.ArgumentParser(description="Every benchmark once, and a table of all.")
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of results")
    parser.add_argument("--taming", type=Path, help="a clone of CompVis/taming-transformers, the peer in training")
    arguments = parser.parse_args()
    failed = []
    for name in NAMES:
        options = ["--taming", str(arguments.taming)] if name == "training" and arguments.taming else []
        if not run(name, arguments.device, arguments.out, options):
            failed.append(name)
    print(flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.summary", "--out", str(arguments.out)], check=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
