"""The marks by which ranks find out whether they share a folder do not pile up when runs are killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from movq_cli import agreement


def test_the_marks_of_killed_runs_are_removed_by_a_later_run(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".shared-old", ".shared-new.partial", "shared-old"))
    for path in (old, new, other):
        path.write_bytes(b"")
    hours_ago = time.time() - 2 * agreement._STALE_SECONDS
    for path in (old, other):
        os.utime(path, (hours_ago, hours_ago))
    levels, name = agreement._mark(tmp_path / "samples" / "of" / "a run")
    assert levels == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([new.name, name, other.name])
