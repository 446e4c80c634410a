"""Runs the campaign and writes what was tried and what was wrong: `python -m tests.campaign --out FILE`."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from movq_cli.version import __version__
from tests.campaign.damage import damages
from tests.campaign.interruptions import interruptions
from tests.campaign.interrupts import early_interrupts
from tests.campaign.pipeline import make_pipeline
from tests.campaign.ranks import QUICK, RANKED, lost_ranks, nodes, references
from tests.campaign.result import KINDS, Case


def cases(folder: Path, seed: int, per_command: int | None, share: float, *, quick: bool) -> Iterator[Case]:
    """Yield all cases of the campaign."""
    work, reference = folder / "work", folder / "reference"
    make_pipeline(work)
    work.rename(reference)
    yield from interruptions(reference, work, seed, per_command)
    yield from damages(reference, work, seed, share)
    yield from islice(early_interrupts(reference, work, seed, per_command or 12), 3 if quick else None)
    found = []
    for made in references(reference, work, QUICK if quick else RANKED):
        if isinstance(made, Case):
            yield made
        else:
            found.append(made)
    yield from lost_ranks(found, reference, work, seed, per_command)
    yield from nodes(found, reference, work, seed, per_command, torchrun=not quick)


def summary(tried: list[Case], options: dict[str, object], seconds: float) -> dict[str, object]:
    """Return the result of a campaign as a JSON object.

    Args:
        tried: Results of all cases.
        options: Options that decide which cases are tried.
        seconds: Duration of the campaign.
    """
    counts = Counter(problem.split(":")[0] for case in tried for problem in case.problems)
    return {
        "version": __version__,
        "machine": platform.processor() or platform.machine(),
        **options,
        "seconds": round(seconds),
        "tried": len(tried),
        **{kind: counts[kind] for kind in KINDS},
        "problems": [{"case": case.name, "problems": case.problems} for case in tried if case.problems],
    }


def main() -> None:
    """Run the campaign, print each problem at once, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the summary")
    parser.add_argument("--seed", type=int, default=0, help="seed of all choices")
    parser.add_argument("--per-command", type=int, help="interruptions of each kind for each command (default: all)")
    parser.add_argument("--share", type=float, default=1.0, help="share of the damaged files that is tried, 0 to 1")
    parser.add_argument("--quick", action="store_true", help="leave out trainings on several ranks, and torchrun")
    arguments = parser.parse_args()
    started, tried = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="movq-campaign-") as folder:
        for case in cases(Path(folder), arguments.seed, arguments.per_command, arguments.share, quick=arguments.quick):
            tried.append(case)
            for problem in case.problems:
                print(f"{case.name}: {problem}", flush=True)
            if len(tried) % 20 == 0:
                print(f"{len(tried)} cases, {time.monotonic() - started:.0f} s", flush=True)
    options = {name: value for name, value in vars(arguments).items() if name != "out"}
    result = summary(tried, options, time.monotonic() - started)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print({name: value for name, value in result.items() if name != "problems"})


if __name__ == "__main__":
    main()
