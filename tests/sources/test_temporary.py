"""Temporary copies of compressed files end with their process, also with a killed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from movq_cli.sources.temporary import remove_abandoned_copies

CODE = """
import sys
from pathlib import Path
from movq_cli.sources.temporary import extract_copy
print(extract_copy(Path("in.tar.gz"), [b"content"], ".tar", compressed=7, remedy=""), flush=True)
sys.stdin.read()
"""


def start(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_copy_of_a_killed_process_is_removed_by_the_next_one_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed, abandoned = start(tmp_path)
    assert abandoned.read_bytes() == b"content"
    killed.kill()
    killed.wait()
    assert abandoned.exists()
    alive, used = start(tmp_path)
    assert not abandoned.exists()
    remove_abandoned_copies()
    assert used.read_bytes() == b"content"
    alive.communicate("")
    assert list(tmp_path.iterdir()) == []
