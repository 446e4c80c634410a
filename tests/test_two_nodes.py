"""Two machines that share no folder: two launchers in two folders, whose ranks meet on the loopback device."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import draw_shapes, edit_header, free_port, run_movq, write_tiny
from tests.forked_movq import ForkedMovq

pytestmark = [pytest.mark.slow, pytest.mark.processes]

Process = subprocess.Popen[str] | ForkedMovq

TRAIN = ["train-vq", "--preset", "tiny.yaml", "--device", "cpu"]
LENGTH = ["-o", "train_vq.steps=20", "-o", "train_vq.checkpoint_every=4", "-o", "train_vq.validate_every=10"]


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared set and a preset that names it by a relative path; tests must not write to it."""
    folder = tmp_path_factory.mktemp("nodes")
    run_movq(folder, "prepare", draw_shapes(folder / "pictures"), "data", "--size", "16", "--val", "12")
    path = write_tiny(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": {"path": "data"}}))
    return folder


@pytest.fixture
def nodes(prepared_once: Path, tmp_path: Path) -> list[Path]:
    """The working folders of two nodes, each with its own copy of the prepared set."""
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        shutil.copytree(prepared_once, folder)
    return folders


def start(nodes: Sequence[Path], *arguments: str, torchrun: bool = False) -> list[Process]:
    """Start one rank on each node: with torchrun, or as a scheduler does that only sets the environment."""
    port = str(free_port())
    processes: list[Process] = []
    for node, folder in enumerate(nodes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(folder / "torch")}
        if torchrun:
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)]
            command += ["--master-addr", "127.0.0.1", "--master-port", port, "-m", "movq_cli", "--", *arguments]
            pipe = subprocess.PIPE
            processes.append(
                subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)
            )
        else:
            environment |= {"RANK": str(node), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.append(ForkedMovq(arguments, folder, environment))
    return processes


def finish(processes: Sequence[Process]) -> list[tuple[int | None, str]]:
    """Return the exit code and the messages of each process."""
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def error_lines(text: str) -> list[str]:
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_killed_node_is_reported_and_the_resumed_run_ends_like_an_uninterrupted_one(nodes: list[Path]) -> None:
    done = finish(start(nodes, *TRAIN, *LENGTH, "--run", "whole", torchrun=True))
    assert [code for code, _ in done] == [0, 0], done
    processes = start(nodes, *TRAIN, *LENGTH, "--run", "killed")
    checkpoint = nodes[0] / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert processes[0].poll() is None and time.monotonic() < deadline, processes[0].communicate()
        time.sleep(0.01)
    processes[1].kill()
    (code, text), _ = finish(processes)
    assert code == 1
    assert len(error_lines(text)) == 1
    assert re.match(r"error: the connection to rank 1 on \S+ was lost: .*same command again", error_lines(text)[0])
    assert json.loads((nodes[0] / "killed" / "run.json").read_text())["status"] == "running"
    done = finish(start(nodes, *TRAIN, *LENGTH, "--run", "killed"))
    assert [code for code, _ in done] == [0, 0], done
    assert "resuming from step" in done[0][1]
    whole, killed = (nodes[0] / run / "tokenizer.safetensors" for run in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    assert not (nodes[1] / "killed").exists()


def test_a_node_with_another_prepared_set_is_refused_by_name(nodes: list[Path]) -> None:
    manifest = nodes[1] / "data" / "manifest.json"
    described = json.loads(manifest.read_text())
    edit_header(manifest, hash="f" * 64)
    for code, text in finish(start(nodes, *TRAIN)):
        assert code == 2, text
        (line,) = error_lines(text)
        assert f"the prepared set {nodes[1] / 'data'} of rank 1 on " in line
        assert f"its hash is {'f' * 12}, not {described['hash'][:12]}. Copy {nodes[0] / 'data'} from rank 0" in line
    assert not (nodes[0] / "runs").exists()


def test_a_prior_on_nodes_that_do_not_share_the_codes_is_refused_before_it_encodes(
    trained_once: Path, nodes: list[Path]
) -> None:
    for node in nodes:
        shutil.copytree(trained_once / "runs", node / "runs", ignore=shutil.ignore_patterns("tokens", "tiny-prior"))
    before = sorted(nodes[0].rglob("*"))
    for code, text in finish(start(nodes, "train-prior", "--preset", "tiny.yaml", "--device", "cpu")):
        assert code == 2, text
        (line,) = error_lines(text)
        assert f"{nodes[0] / 'runs' / 'tiny-vq' / 'tokens'} of rank 0 on " in line
        assert re.search(r"is not visible on rank 1 on \S+\. Use a folder that all machines share", line)
        assert "encoding" not in text
    assert sorted(nodes[0].rglob("*")) == before


def test_the_error_of_one_node_ends_the_other_with_the_reason(nodes: list[Path]) -> None:
    (nodes[1] / "tiny.yaml").unlink()
    (code, text), (other_code, other_text) = finish(start(nodes, *TRAIN))
    assert (code, other_code) == (2, 2)
    assert error_lines(other_text)[0].startswith("error: no preset file at tiny.yaml")
    (line,) = error_lines(text)
    assert re.match(r"error: rank 1 on \S+ ended: no preset file at tiny.yaml", line)
