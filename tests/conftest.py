"""Fixtures of several test files: tiny settings, tiny prepared sets, trained runs, and `movq` as a real process."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from torch.multiprocessing.spawn import ProcessContext, start_processes

from movq_cli import digests
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.launcher import joined_ranks
from movq_cli.ranks import Ranks
from movq_cli.settings import Preset
from tests import forked_movq

hypothesis.settings.register_profile("movq", deadline=None)  # A deadline measures the machine, not the code.
hypothesis.settings.load_profile("movq")

TINY = {
    "description": "seconds on a CPU",
    "vq": {
        "resolution": 16,
        "channels": 32,
        "multipliers": [1, 1],
        "blocks": 1,
        "attention_resolutions": [8],
        "z_channels": 16,
        "embed_dim": 16,
        "codebook_size": 16,
        "modulation": {"levels": 1},
    },
    "train_vq": {
        "batch_size": 8,
        "epochs": None,
        "steps": 10,
        "base_learning_rate": 1.25e-4,
        "perceptual_weight": 0.0,
        "discriminator_start": 4,
        "discriminator_channels": 8,
        "discriminator_layers": 1,
        "revive_every": 3,
        "ema_decay": 0.9,
        "precision": "float32",
        "log_every": 1,
        "validate_every": 5,
        "checkpoint_every": 5,
        "report": False,
    },
    "prior": {"layers": 2, "heads": 2, "width": 32, "hidden": 64, "classes": 3},
    "train_prior": {
        "batch_size": 8,
        "epochs": None,
        "steps": 10,
        "base_learning_rate": 1.25e-4,
        "ema_decay": 0.9,
        "label_dropout": 0.1,
        "precision": "float32",
        "log_every": 1,
        "validate_every": 5,
        "checkpoint_every": 5,
        "report": False,
    },
    "sample": {"steps": 4},
}
"""Settings of a preset that uses every part of both stages and trains within seconds."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Use one thread, so that the order of sums, and with it every bit, does not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Name a cache of features that only this test uses, and not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tiny() -> Preset:
    """The settings of the tiny preset."""
    return Preset.model_validate(TINY)


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    """The path of the tiny preset's file."""
    return write_tiny(tmp_path)


def write_tiny(folder: Path) -> Path:
    """Write the tiny preset, which trains on `data` in the same folder, and return its path; JSON is valid YAML."""
    path = folder / "tiny.yaml"
    path.write_text(json.dumps({**TINY, "data": {"path": str(folder / "data")}}))
    return path


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A folder of 60 images in three class folders."""
    return draw_shapes(tmp_path / "pictures")


def draw_shapes(folder: Path) -> Path:
    """Write 60 images of 20 x 16 pixels into three class folders; each class has a shape of its own."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("bar", "dot", "sky")):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            picture = rng.integers(0, 60, (16, 20, 3), dtype=np.uint8)
            top = rng.integers(2, 10)
            if label == 0:
                picture[top : top + 3, :, 0] = 220
            elif label == 1:
                picture[top : top + 4, 8 : 8 + 4, 1] = 230
            else:
                picture[:top, :, 2] = 240
            Image.fromarray(picture).save(folder / name / f"{number:03d}.png")
    return folder


@pytest.fixture
def prepared(shapes: Path, tmp_path: Path) -> PreparedSet:
    """The images of `shapes` as a prepared set, with 48 training images and 12 validation images."""
    out = tmp_path / "data"
    prepare(PrepareRequest(str(shapes), out, Preprocessing(size=16), val="12"), Console(quiet=True))
    return PreparedSet.open(out)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set an empty torch hub folder, and make every download fail at once."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name, known in list(WEIGHTS.items()):
        closed = dataclasses.replace(known, url=f"http://127.0.0.1:9/{known.file}")
        monkeypatch.setitem(WEIGHTS, name, closed)


def edit_header(path: Path, **changes: object) -> None:
    """Change fields of a JSON file that carries its digest, and give it the digest of its new content."""
    values = {**json.loads(path.read_text()), **changes, "digest": digests.NO_DIGEST}
    path.write_bytes(digests.with_digest(json.dumps(values).encode()))


def read_terminal(descriptor: int) -> bytes:
    """Return all that a process writes to a pseudo-terminal, until it closes it."""
    shown = b""
    while True:
        try:
            block = os.read(descriptor, 4096)
        except OSError:  # This is how Linux reports the end of a terminal.
            break
        if not block:
            break
        shown += block
    return shown


Movq = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def movq(tmp_path: Path) -> Movq:
    """A function that runs `movq` as a process in an empty folder and checks its exit code."""
    return partial(run_movq, tmp_path)


def run_movq(
    folder: Path, *arguments: str | Path, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `movq` as a process of its own in a folder, and check its exit code.

    Args:
        folder: Working directory.
        arguments: Command-line arguments.
        code: Expected exit code.
        environment: Additional environment variables.
    """
    folders = {"TORCH_HOME": str(folder / "torch"), "XDG_CACHE_HOME": str(folder / "cache")}
    done = forked_movq.run(
        [str(argument) for argument in arguments],
        folder,
        os.environ | {"OMP_NUM_THREADS": "1", **folders} | environment,
        timeout=300,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared set and trained runs of both stages; tests must not write to it."""
    folder = tmp_path_factory.mktemp("trained")
    run_movq(folder, "prepare", draw_shapes(folder / "pictures"), "data", "--size", "16", "--val", "12")
    run_movq(folder, "train-vq", "--preset", write_tiny(folder))
    run_movq(folder, "train-prior", "--preset", folder / "tiny.yaml")
    return folder


@pytest.fixture(scope="session")
def ordered_once(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trained priors of the modes auto and depth in `auto` and `depth`; tests must not write to it."""
    folder = tmp_path_factory.mktemp("ordered")
    for mode in ("auto", "depth"):
        settings = [f"prior.mode={mode}", "prior.layers=3", "train_prior.steps=2", "train_prior.validate_every=2"]
        run_movq(
            trained_once,
            *("train-prior", "--preset", trained_once / "tiny.yaml", "--tokenizer", "runs/tiny-vq"),
            *("--run", folder / mode),
            *(part for setting in settings for part in ("-o", setting)),
        )
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of `trained_once` to which a test may write."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    write_tiny(tmp_path)
    return tmp_path


Work = Callable[[Ranks, Any], Any]
"""What the processes of several ranks run: a function of the ranks and of an argument that is equal on all."""


def on_ranks(work: Work, argument: object, folder: Path, world: int) -> list[Any]:
    """Run `work` on several ranks, which are real processes on the CPU, and return their results.

    Args:
        work: Function to run, which must be importable.
        argument: Second argument of the function.
        folder: Folder for the results.
        world: Number of ranks.
    """
    _start(world, work, argument, folder, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def start_ranks(work: Work, argument: object, folder: Path, world: int) -> list[Any]:
    """Start `work` on several ranks as `on_ranks` does, and return their processes without waiting for them."""
    processes = _start(world, work, argument, folder, join=False)
    assert processes is not None
    return processes.processes


def _start(world: int, work: Work, argument: object, folder: Path, *, join: bool) -> ProcessContext | None:
    forked_movq.context()  # It sets what the server of these processes has imported.
    arguments = (world, free_port(), work, argument, folder)
    return start_processes(_run_rank, arguments, nprocs=world, join=join, start_method="forkserver")


def free_port() -> int:
    """Return a port on which the ranks can connect to each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def _run_rank(rank: int, world: int, port: int, work: Work, argument: object, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined_ranks("cpu") as (ranks, _):
        torch.save(work(ranks, argument), folder / f"{rank}.pt")


# --- the tests that `make test-fast` leaves out -----------------------------------------------------------------------

_PROCESS_FIXTURES = {"movq", "trained_once", "ordered_once"}
_PROCESS_FUNCTIONS: set[object] = {on_ranks, start_ranks, run_movq}


def pytest_configure() -> None:
    """Let SIGINT interrupt the tests that send it, also if a shell has started them in the background, without it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """Return one worker more than there are cores, because many tests wait for the processes that they start."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes which import torch: through a fixture, or by calling a function from here."""
    for item in items:
        if isinstance(item, pytest.Function) and (
            _PROCESS_FIXTURES & set(item.fixturenames) or _starts_processes(item.function, set())
        ):
            item.add_marker(pytest.mark.processes)


def _starts_processes(function: object, visited: set[object]) -> bool:
    """Return whether a function names one that starts processes, itself or through functions of its own module."""
    if function in _PROCESS_FUNCTIONS:
        return True
    if not isinstance(function, FunctionType) or function in visited:
        return False
    visited.add(function)
    own = vars(sys.modules[function.__module__])
    named = [own.get(name) for name in _names(function.__code__)]
    return any(
        _starts_processes(other, visited)
        for other in named
        if isinstance(other, FunctionType) and (other in _PROCESS_FUNCTIONS or other.__module__ == function.__module__)
    )


def _names(code: CodeType) -> set[str]:
    """Return the global names in a function and in the functions inside it."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
