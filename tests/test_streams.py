"""Standard streams that cannot be written: the work goes on when its messages are lost."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from movq_cli import streams
from tests.conftest import draw_shapes, run_movq, write_tiny


def broken_pipe() -> int:
    """Return the end for writing of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def survive(monkeypatch: pytest.MonkeyPatch, descriptor: int) -> None:
    """Make this file stderr, and survive its loss."""
    monkeypatch.setattr(sys, "stderr", os.fdopen(descriptor, "w", buffering=1))
    streams.survive_loss_of_stderr()


@pytest.mark.parametrize("kind", ["full", "pipe"])
def test_a_lost_stderr_gets_the_null_device(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    descriptor = broken_pipe() if kind == "pipe" else os.open("/dev/full", os.O_WRONLY)
    survive(monkeypatch, descriptor)
    for _ in range(3):
        assert sys.stderr.write("a line\n") == 7
        sys.stderr.flush()
    assert os.fstat(descriptor).st_rdev == Path(os.devnull).stat().st_rdev
    assert streams.discard_unwritable() is None


def test_a_reader_that_is_slow_loses_only_what_it_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    survive(monkeypatch, writer)
    for _ in range(40):
        sys.stderr.write("x" * 5000 + "\n")
    assert os.read(reader, 100) == b"x" * 100
    while len(os.read(reader, 2**16)) == 2**16:
        pass
    sys.stderr.write("the last line\n")
    assert os.read(reader, 2**20).endswith(b"the last line\n")
    os.close(reader)


def test_a_stream_without_a_file_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    streams.survive_loss_of_stderr()
    assert sys.stderr is stream


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2> >(head -c 100 > /dev/null)", "2>/dev/full", ">&- 2>&-"])
def test_a_training_goes_on_when_its_messages_are_lost(tmp_path: Path, redirection: str) -> None:
    run_movq(tmp_path, "prepare", draw_shapes(tmp_path / "pictures"), "data", "--size", "16", "--val", "12")
    line = f"{sys.executable} -m movq_cli train-vq -p {write_tiny(tmp_path)} --device cpu {redirection}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, check=False, timeout=300)
    assert done.returncode == 0
    manifest = json.loads((tmp_path / "runs/tiny-vq/run.json").read_text())
    assert (manifest["status"], manifest["step"]) == ("finished", 10)
