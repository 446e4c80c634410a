"""A small part of the campaign of `make campaign`, chosen by a seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.processes
def test_no_result_is_lost_unequal_or_silently_wrong(tmp_path: Path) -> None:
    """The campaign runs in a process without threads, because its commands are forked from it."""
    command = [sys.executable, "-m", "tests.campaign", "--quick"]
    command += ["--per-command", "1", "--share", "0.06", "--seed", "1"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "campaign.json"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "campaign.json").read_text())
    assert result["tried"] > 40
    assert result["problems"] == [], done.stdout
