"""Foreign names are shown as they are, whatever a terminal or Rich would make of them; JSON and pipes stay exact."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from movq_cli.console import printable
from tests.conftest import read_terminal

NAME = "\x1b[2J[red]a[/] [/] :smile: \x9b1m\u202eb\udce9\tc\nd"
CODE = f"""
from movq_cli.console import Console, write_line
name = {NAME!r}
out = Console(as_json=False)
out.log(name)
out.warn(name)
write_line(name)
with out.progress(2, name, "things") as progress:
    progress.advance(2, {{"[/]": "[red]"}})
out.table({{"name": name}}, ["name"], [[name]])
out.result({{"name": name}}, name)
"""


def on_terminal(code: str) -> bytes:
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "PYTHONUTF8": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=side, stderr=side, env=environment)
    os.close(side)
    shown = read_terminal(main)
    assert process.wait() == 0, shown
    return shown


def test_a_terminal_gets_no_sequence_of_a_name_and_rich_no_markup() -> None:
    shown = on_terminal(CODE)
    assert b"\x1b[2J" not in shown
    assert "\x9b".encode() not in shown
    assert "\u202e".encode() not in shown
    assert shown.count(rb"\x1b[2J[red]a[/] [/] :smile: \x9b1m\u202eb\udce9") >= 6
    assert b"[/]" in shown and b"[red]" in shown


def test_a_pipe_gets_the_exact_result_and_escaped_messages() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True)
    messages = done.stderr.splitlines()
    escaped = rb"\x1b[2J[red]a[/] [/] :smile: \x9b1m\u202eb\udce9\tc\nd"
    assert messages[:3] == [escaped, b"warning: " + escaped, escaped]
    heading, cell, *rest = done.stdout.split(b"\n")
    assert (heading, cell) == (b"name", escaped)
    assert b"\n".join(rest) == NAME.encode(errors="surrogateescape") + b"\n"


def test_json_is_exact() -> None:
    code = CODE.replace("as_json=False", "as_json=True, quiet=True")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert [json.loads(line)["name"] for line in done.stdout.splitlines()] == [NAME, NAME]


@pytest.mark.parametrize("text", ["café", "日本\u3000語", "😀", "a\u00a0b", "[bold]", "back\\slash"])
def test_what_can_be_printed_is_unchanged(text: str) -> None:
    assert printable(text) == text


def test_a_very_long_line_loses_its_middle() -> None:
    assert len(printable("a" * 10**6 + "end")) < 5000
    assert printable("a" * 10**6 + "end").endswith("end")


def test_an_error_of_a_command_is_escaped(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "movq_cli", "prepare", "\x1b[2Jnone", "out"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2 and b"\x1b" not in done.stderr and done.stderr.count(b"\n") == 1
