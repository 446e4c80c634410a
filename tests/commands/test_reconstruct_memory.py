"""An image for which the memory does not suffice is named and left out, and the others are reconstructed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from movq_cli import checkpoints
from movq_cli.app import app
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset

LIMIT = 3000
"""Number of pixels, of all images of a batch, for which the memory of the test's device suffices."""


@pytest.fixture
def weights(tiny: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights of an untrained tokenizer, which has memory for few pixels."""
    encode = Tokenizer.encode

    def limited(self: Tokenizer, images: Tensor) -> Tensor:
        if images.shape[0] * images.shape[2] * images.shape[3] > LIMIT:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encode(self, images)

    monkeypatch.setattr(Tokenizer, "encode", limited)
    path = tmp_path / "tokenizer.safetensors"
    torch.manual_seed(0)
    checkpoints.save_weights(path, Tokenizer(tiny.vq), checkpoints.TokenizerHeader(vq=tiny.vq))
    return path


def save(folder: Path, **sides: int) -> Path:
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name, side in sides.items():
        Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def reconstruct(weights: Path, *arguments: str | Path) -> None:
    app(
        ["reconstruct", *map(str, arguments), "--run", str(weights), "--device", "cpu", "--json"], standalone_mode=False
    )


def test_a_large_image_is_left_out_and_named(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = save(tmp_path / "images", a=20, b=80, c=20)
    with pytest.raises(FailureError, match=r"1 of 3 images were left out.* b\.png of 80 x 80 pixels"):
        reconstruct(weights, images, tmp_path / "out", "--metrics")
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert (result["images"], result["skipped"]) == (2, 1)
    assert "1 images were skipped: out of memory at b.png of 80 x 80 pixels" in shown.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_a_batch_that_is_too_large_is_reconstructed_one_by_one(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = save(tmp_path / "images", **{f"i{number}": 40 for number in range(5)})
    for size in ("1", "4"):
        reconstruct(weights, images, tmp_path / size, "--batch-size", size)
    assert "skipped:" not in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 5
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes() for name in names)


def test_images_that_are_all_too_large_are_an_error(tmp_path: Path, weights: Path) -> None:
    images = save(tmp_path / "images", a=80)
    with pytest.raises(BadRequestError, match=r"no usable image in .*: out of memory at a\.png of 80 x 80 pixels"):
        reconstruct(weights, images, tmp_path / "out")
