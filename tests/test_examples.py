"""The scripts in examples/ run as they are, on real digits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movq_cli import Tokenizer
from movq_cli.sources.open import open_source
from tests.conftest import run_movq

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = 120
TOKENIZER = ("vq.multipliers=[1,1,1,1]", "vq.z_channels=16", "vq.embed_dim=16", "vq.codebook_size=32")
STEPS = ("steps=3", "validate_every=3", "checkpoint_every=2")


def run_example(folder: Path, name: str, *arguments: str, **environment: str) -> str:
    """Run a script in a folder; returns what it printed."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "2", "TORCH_HOME": str(folder / "torch")} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some real digits, as files and as a prepared set, and a tokenizer trained by the example."""
    folder = tmp_path_factory.mktemp("digits")
    known = open_source("digits")
    assert known.labels is not None
    for index in range(0, len(known.names), len(known.names) // DIGITS):
        path = folder / "digits" / known.classes[known.labels[index]] / known.names[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(known.read(index))
    run_movq(folder, "prepare", "digits/", "data", "--size", "32", "--val", "20")
    settings = [*TOKENIZER, *(f"train_vq.{setting}" for setting in STEPS)]
    printed = run_example(folder, "train_from_python.py", "data", "runs/my-vq", *settings)
    assert "PSNR" in printed
    return folder


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60


def test_a_run_trained_from_python_is_finished_and_is_used_by_the_commands(digits: Path) -> None:
    settings = [*TOKENIZER, *(f"train_vq.{setting}" for setting in STEPS)]
    again = run_example(digits, "train_from_python.py", "data", "runs/my-vq", *settings)
    assert "PSNR" not in again, "a finished run is trained again"
    shown = run_movq(digits, "reconstruct", "data", "rebuilt", "--split", "val")
    assert "rebuilt" in shown.stdout


def test_the_codes_of_a_folder_decode_to_what_the_tokenizer_decodes(digits: Path, tmp_path: Path) -> None:
    run_example(digits, "codes_of_a_folder.py", "runs/my-vq", "digits", str(tmp_path / "codes.npy"), str(tmp_path))
    codes = np.load(tmp_path / "codes.npy")
    files = sorted((digits / "digits").rglob("*.png"))
    assert codes.shape == (len(files), 4, 4, 4)
    assert codes.dtype == np.uint16
    # The command encodes the same pixels to the same codes, and decodes them to the same images.
    run_movq(digits, "reconstruct", "digits/", tmp_path / "out", "--run", "runs/my-vq", "--codes", tmp_path / "maps")
    for number, file in enumerate(files):
        name = file.relative_to(digits / "digits")
        assert np.array_equal(np.load((tmp_path / "maps" / name).with_suffix(".npy")), codes[number])
        ours = np.asarray(Image.open(tmp_path / f"{number:06d}.png"), dtype=int)
        assert np.abs(ours - np.asarray(Image.open(tmp_path / "out" / name), dtype=int)).max() <= 1
    assert Tokenizer.load(digits / "runs" / "my-vq").settings.codebook_size > codes.max()


def test_guided_samples_fill_a_grid_that_changes_with_guidance(digits: Path, tmp_path: Path) -> None:
    prior = ("prior.layers=2", "prior.width=32", "prior.hidden=32", *(f"train_prior.{setting}" for setting in STEPS))
    overrides = [part for setting in (*TOKENIZER, *prior) for part in ("-o", setting)]
    run_movq(digits, "train-prior", "--preset", "digits", "--data", "data", "--tokenizer", "runs/my-vq", *overrides)
    printed = run_example(digits, "guided_samples.py", PICTURE=str(tmp_path / "guided.png"))
    assert "10 classes" in printed
    picture = np.asarray(Image.open(tmp_path / "guided.png"))
    assert picture.shape == (3 * 4 * 32, 10 * 32, 3)
    plain, _, guided = np.split(picture, 3)
    assert not np.array_equal(plain, guided)
