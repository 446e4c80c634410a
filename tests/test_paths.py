"""Names that are as long as a file system allows, or not UTF-8: they work, or are refused before any work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from movq_cli import checkpoints, files
from movq_cli.app import app
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset
from tests.conftest import write_tiny

LATIN = os.fsdecode(b"gar\xe7on")
"""A name in Latin-1, which is not valid UTF-8."""


@pytest.fixture
def weights(tiny: Preset, tmp_path: Path) -> Path:
    """The weights of an untrained tokenizer."""
    path = tmp_path / "tokenizer.safetensors"
    torch.manual_seed(0)
    checkpoints.save_weights(path, Tokenizer(tiny.vq), checkpoints.TokenizerHeader(vq=tiny.vq))
    return path


@pytest.mark.parametrize("length", [240, 247, 248, 255])
@pytest.mark.parametrize("character", ["n", "é"])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path, length: int, character: str) -> None:
    name = character * (length // len(character.encode()))
    files.atomic_write(tmp_path / name, b"data")
    files.atomic_write(tmp_path / name, b"again", concurrent=True)
    files.write_once(tmp_path / f"w{name[1:]}", b"once")
    files.link_or_copy(tmp_path / name, tmp_path / f"l{name[1:]}")
    assert (tmp_path / name).read_bytes() == (tmp_path / f"l{name[1:]}").read_bytes() == b"again"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_longer_name_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(FailureError, match=r"name too long. Choose a shorter name\."):
        files.atomic_write(tmp_path / ("n" * 256), b"data")


def test_images_of_long_names_are_reconstructed_or_left_out(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    # Of two names that differ in their suffix only, both get `.png` appended, which makes the second one too long.
    for name in ("n" * 244 + ".png", "m" * 251 + ".png", "k" * 251 + ".bmp", "k" * 251 + ".png", "short.png"):
        image = Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        image.save(tmp_path / "images" / name, format=name[-3:])
    arguments = ["reconstruct", tmp_path / "images", tmp_path / "out", "--run", weights, "--device", "cpu"]
    app([*map(str, arguments), "--codes", str(tmp_path / "codes")], standalone_mode=False)
    assert "2 images were skipped: kkk" in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"n" * 244 + ".png", "m" * 251 + ".png", "short.png"}


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have names in UTF-8 only")
def test_a_folder_that_is_not_utf8_is_refused_before_the_work_and_a_link_to_it_works(
    prepared: PreparedSet, weights: Path, tmp_path: Path
) -> None:
    preset = str(write_tiny(tmp_path))
    latin = tmp_path / LATIN
    prepared.root.rename(latin)
    (tmp_path / "link").symlink_to(latin)
    run = ["train-vq", "-p", preset, "--device", "cpu", "-o", "train_vq.steps=5"]
    for options in (
        ["--data", str(latin), "--run", str(tmp_path / "run")],
        ["--data", str(tmp_path / "link"), "--run", f"{latin}-run"],
    ):
        with pytest.raises(BadRequestError, match="is not valid UTF-8"):
            app([*run, *options], standalone_mode=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [LATIN, "link", "pictures", "tiny.yaml", "tokenizer.safetensors"]
    )
    app([*run, "--data", str(tmp_path / "link"), "--run", str(tmp_path / "run")], standalone_mode=False)
    moved = tmp_path / f"{LATIN}.safetensors"
    weights.rename(moved)
    with pytest.raises(BadRequestError, match="is not valid UTF-8"):
        checkpoints.load_tokenizer(moved)
    weights.symlink_to(moved)
    assert checkpoints.load_tokenizer(weights)
