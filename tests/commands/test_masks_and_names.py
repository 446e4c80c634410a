"""Masks with transparent pixels, names that are those of folders, and folders that are called like a data set."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from movq_cli.app import app
from movq_cli.checkpoints import TokenizerHeader, save_weights
from movq_cli.commands import fill
from movq_cli.commands.reconstruct import output_names
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import paired
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset
from movq_cli.sources.kinds.named import ArrayReader
from movq_cli.sources.outputs import protect_source
from movq_cli.sources.source import Source
from tests.sources.files import fill as write_images
from tests.test_api import prior


@pytest.fixture
def weights(tiny: Preset, tmp_path: Path) -> Path:
    """The weights of an untrained tokenizer."""
    path = tmp_path / "weights" / "tokenizer.safetensors"
    torch.manual_seed(0)
    save_weights(path, Tokenizer(tiny.vq), TokenizerHeader(vq=tiny.vq))
    return path


NAMES = [
    f"{folder}{stem}.{suffix}"
    for folder, stem, suffix in itertools.product(("", "a/", "a.png/", "a.npy/"), ("a", "a.png"), ("png", "jpg"))
]


@given(st.lists(st.sampled_from(NAMES), min_size=1))
def test_no_output_has_the_name_of_a_folder_of_another_one(names: Sequence[str]) -> None:
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    names = sorted(set(names) - folders)
    outputs = output_names(names)
    files = {*outputs, *(str(PurePosixPath(name).with_suffix(".npy")) for name in outputs)}
    assert len(files) == 2 * len(names) and files.isdisjoint(folders)
    pairs = paired.match(names, sorted(outputs)) if names else None
    assert pairs is None or len(pairs.indices) == len(names)


def test_an_image_beside_a_folder_of_its_outputs_name_is_reconstructed(tmp_path: Path, weights: Path) -> None:
    write_images(tmp_path / "imgs", "a.jpg", "a.png/b.png", "c.npy/d.png", "c.png")
    folders = [str(tmp_path / name) for name in ("imgs", "out", "codes")]
    app(
        ["reconstruct", *folders[:2], "--codes", folders[2], "--run", str(weights), "--device", "cpu", "-q"],
        standalone_mode=False,
    )
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert found == ["a.jpg.png", "a.png/b.png", "c.npy/d.png", "c.png.png"]
    assert len([path for path in (tmp_path / "codes").rglob("*") if path.is_file()]) == 4


def test_transparent_pixels_of_a_mask_are_not_filled_in(tmp_path: Path, tiny: Preset) -> None:
    model = prior(tiny)
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:4, :8] = 255  # White strokes on transparent ground, as a program for painting stores a layer.
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert np.array_equal(fill._read_mask(tmp_path / "mask.png", model)[0].numpy(), pixels[..., 3] > 0)
    Image.fromarray(np.zeros_like(pixels)).save(tmp_path / "empty.png")
    with pytest.raises(BadRequestError, match="has no white pixel"):
        fill._read_mask(tmp_path / "empty.png", model)


def test_output_in_a_folder_that_has_the_name_of_the_data_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = ArrayReader(np.zeros((1, 9, 9), np.uint8))
    source = Source("cifar10", ("0.png",), (0,), reader)
    with pytest.raises(BadRequestError, match="would be read in place of the data set cifar10 the next time"):
        protect_source(source, [Path("./cifar10")], [])
    protect_source(source, [Path("data/cifar10")], [])


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_output_below_a_file_is_refused_before_the_work(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("x")
    source = Source("cifar10", ("0.png",), (0,), ArrayReader(np.zeros((1, 9, 9), np.uint8)))
    with pytest.raises(BadRequestError, match="file is a file, so that nothing can be written into it"):
        protect_source(source, [tmp_path / folder], [])
    with pytest.raises(BadRequestError, match="file is a file, so that nothing can be written into it"):
        protect_source(source, [], [], pictures=[tmp_path / folder / "grid.png"])
    protect_source(source, [tmp_path / "new" / "folder"], [], pictures=[tmp_path / "other" / "grid.png"])
