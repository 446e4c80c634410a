"""The code cache: what the tokenizer gives, once, and never another tokenizer's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from movq_cli.console import Console
from movq_cli.data import pixels, tokens
from movq_cli.data.shards import PreparedSet, Split
from movq_cli.errors import BadRequestError
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import DataSettings, Preset

CPU = torch.device("cpu")


@pytest.fixture
def split(prepared: PreparedSet) -> Split:
    return prepared.split("val")


@pytest.fixture
def model(tiny: Preset) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(tiny.vq).eval()


def make(folder: Path, model: Tokenizer, split: Split, tokenizer: str = "t" * 64) -> tokens.TokenCache:
    return tokens.cached(
        folder,
        model,
        split,
        loading=DataSettings(),
        name="val",
        data="d" * 64,
        tokenizer=tokenizer,
        batch_size=5,
        device=CPU,
        console=Console(quiet=True),
    )


def test_it_holds_the_codes_of_every_image_and_its_label(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    cache = make(tmp_path / "tokens", model, split)
    assert (len(cache), cache.codes.dtype, cache.codes.shape) == (12, np.uint16, (12, 8, 8, 4))
    for index in range(12):
        image = pixels.from_array(split.pixels(index)[:, 2:18])
        codes = model.encode(pixels.to_signed(image)[None])[0]
        assert np.array_equal(cache.codes[index], codes)
    assert cache.labels is not None and split.labels is not None
    assert np.array_equal(cache.labels, split.labels)


def test_it_is_made_once(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    make(tmp_path / "tokens", model, split)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").rglob("*.*")}
    make(tmp_path / "tokens", model, split)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").rglob("*.*")} == made


def test_one_without_its_header_is_made_again(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    codes = np.array(make(tmp_path / "tokens", model, split).codes)
    (folder,) = (tmp_path / "tokens").iterdir()
    (folder / "header.json").unlink()
    (folder / "codes.npy").write_bytes(b"half")
    assert np.array_equal(make(tmp_path / "tokens", model, split).codes, codes)


def test_another_tokenizers_codes_are_refused(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    make(tmp_path / "tokens", model, split)
    with pytest.raises(BadRequestError, match="another tokenizer"):
        make(tmp_path / "tokens", model, split, tokenizer="u" * 64)


def test_a_damaged_header_is_named(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    make(tmp_path / "tokens", model, split)
    (folder,) = (tmp_path / "tokens").iterdir()
    (folder / "header.json").write_text("{")
    with pytest.raises(BadRequestError, match=folder.name):
        make(tmp_path / "tokens", model, split)
