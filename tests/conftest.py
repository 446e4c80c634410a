"""What several tests start from: tiny settings, tiny prepared sets, the command line as a real process."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import multiprocessing

from movq_cli import ranks
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.ranks import Ranks
from movq_cli.settings import Preset

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
    },
    "prior": {"layers": 2, "heads": 2, "width": 32, "hidden": 64, "classes": 3},
    "train_prior": {
        "batch_size": 8,
        "epochs": None,
        "steps": 10,
        "base_learning_rate": 1.25e-4,
        "ema_decay": 0.9,
        "precision": "float32",
        "log_every": 1,
        "validate_every": 5,
        "checkpoint_every": 5,
    },
    "sample": {"steps": 4},
}
"""A preset in which every part of both stages has something to do."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums in one order: golden numbers and bit-equality must not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Preset:
    """The tiny preset, as typed settings."""
    return Preset.model_validate(TINY)


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    """The tiny preset as a file."""
    return write_tiny(tmp_path)


def write_tiny(folder: Path) -> Path:
    """The tiny preset, training on `data` in the same folder; JSON is YAML."""
    path = folder / "tiny.yaml"
    path.write_text(json.dumps({**TINY, "data": {"path": str(folder / "data")}}))
    return path


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A folder of 60 pictures in three class folders."""
    return draw_shapes(tmp_path / "pictures")


def draw_shapes(folder: Path) -> Path:
    """60 pictures of 20 x 16 pixels in three class folders, told apart by what is drawn on them."""
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
    """The pictures of `shapes` as a prepared set, 48 to train on and 12 held out."""
    out = tmp_path / "data"
    prepare(PrepareRequest(str(shapes), out, Preprocessing(size=16), val="12"), Console(quiet=True))
    return PreparedSet.open(out)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty hub folder, and downloads from a port where nobody listens."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name, known in list(WEIGHTS.items()):
        closed = dataclasses.replace(known, url=f"http://127.0.0.1:9/{known.file}")
        monkeypatch.setitem(WEIGHTS, name, closed)


Movq = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def movq(tmp_path: Path) -> Movq:
    """Run `movq` with arguments as its own process, in an empty folder; checks the exit code."""
    return partial(run_movq, tmp_path)


def run_movq(
    folder: Path, *arguments: str | Path, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `movq` in a folder."""
    done = subprocess.run(
        [sys.executable, "-m", "movq_cli", *map(str, arguments)],
        cwd=folder,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(folder / "torch"), "XDG_CACHE_HOME": str(folder / "cache")}
        | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures as a prepared set and both stages trained; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    run_movq(folder, "prepare", draw_shapes(folder / "pictures"), "data", "--size", "16", "--val", "12")
    run_movq(folder, "train-vq", "--preset", write_tiny(folder))
    run_movq(folder, "train-prior", "--preset", folder / "tiny.yaml")
    return folder


@pytest.fixture(scope="session")
def ordered_once(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `auto` and `depth`: priors of those modes on the same tokenizer; not to be written to."""
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
    """A copy of it to work in."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    write_tiny(tmp_path)
    return tmp_path


Work = Callable[[Ranks, Any], Any]


def on_ranks(work: Work, given: object, folder: Path, world: int) -> list[Any]:
    """What `work` returns on each of so many ranks, real processes on the CPU."""
    multiprocessing.spawn(_rank, (world, free_port(), work, given, folder), nprocs=world)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(world)]


def start_ranks(work: Work, given: object, folder: Path, world: int) -> list[Any]:
    """The processes of so many ranks that have begun to `work`."""
    arguments = (world, free_port(), work, given, folder)
    return multiprocessing.spawn(_rank, arguments, nprocs=world, join=False).processes


def free_port() -> int:
    """A port for ranks to meet at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _rank(number: int, world: int, port: int, work: Work, given: object, folder: Path) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with ranks.joined_ranks("cpu") as (mine, _):
        torch.save(work(mine, given), folder / f"{number}.pt")
