"""The console writes only results to stdout and all else to stderr, in each mode, on real pipes and a real terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

from tests.conftest import read_terminal

CODE = """
import time
from movq_cli import console
console.SECONDS_BETWEEN_LINES = 0.05
out = console.Console(as_json={as_json}, quiet={quiet})
out.log("working")
out.warn("careful")
with out.progress(30, "counting", "things", done=10) as progress:
    for number in range(20):
        time.sleep(0.02)
        progress.advance(1, {{"loss": str(number), "rate": "3"}})
out.table({{"a": 1, "b": None}}, ["name", "value"], [["a", "1"], ["b", "long " * 40]])
"""


def run(*, as_json: bool = False, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    code = CODE.format(as_json=as_json, quiet=quiet)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_in_a_pipe_the_table_is_tab_separated_and_never_wrapped() -> None:
    done = run()
    assert [row.split("\t")[0] for row in done.stdout.splitlines()] == ["name", "a", "b"]
    assert done.stderr.splitlines()[:2] == ["working", "warning: careful"]


def test_json_is_one_object_and_nothing_else() -> None:
    done = run(as_json=True)
    assert json.loads(done.stdout) == {"a": 1, "b": None}
    assert done.stdout.count("\n") == 1


def test_quiet_leaves_warnings_and_the_result() -> None:
    done = run(quiet=True)
    assert done.stderr == "warning: careful\n"
    assert done.stdout


def test_without_a_terminal_progress_is_plain_lines_with_count_rate_and_eta() -> None:
    done = run()
    lines = [line for line in done.stderr.splitlines() if line.startswith("counting")]
    assert 2 <= len(lines) <= 15
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert "30/30 things" in lines[-1]
    assert "ETA" in lines[-1]
    assert "loss 19" in lines[-1]


def test_on_a_terminal_progress_is_a_bar_and_stdout_has_the_result_alone() -> None:
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(as_json=True, quiet=False)],
        stdout=subprocess.PIPE,
        stderr=side,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"},
    )
    os.close(side)
    shown = read_terminal(main)
    out, _ = process.communicate()
    assert json.loads(out) == {"a": 1, "b": None}
    assert b"\x1b[" in shown
    assert b"30/30" in shown
    assert b"19" in shown.split(b"loss")[-1]
    assert b"rate" in shown
