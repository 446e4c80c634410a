"""The code cache: what the tokenizer gives of every view, once, whoever encodes it, and never another tokenizer's."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from movq_cli import digests
from movq_cli.console import Console
from movq_cli.data import blocks, code_cache, pixels
from movq_cli.data.blocks import Arrays, Blocks
from movq_cli.data.shards import PreparedSet, Split
from movq_cli.errors import BadRequestError
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.settings import DataSettings, Preset, ViewSettings
from tests.conftest import on_ranks, start_ranks

CPU = torch.device("cpu")
PLAIN = ViewSettings()
MANY = ViewSettings(mirror=True, scales=(1.5, 1.25))
"""20 views; 16 pixels become 24 and 20."""


@pytest.fixture
def split(prepared: PreparedSet) -> Split:
    return prepared.split("val")


@pytest.fixture
def model(tiny: Preset) -> Tokenizer:
    return untrained(tiny)


def untrained(preset: Preset) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(preset.vq).eval()


def make(
    folder: Path,
    model: Tokenizer,
    split: Split,
    views: ViewSettings = PLAIN,
    *,
    tokenizer: str = "t" * 64,
    ranks: Ranks = SINGLE_PROCESS,
    workers: int = 0,
    console: Console | None = None,
) -> code_cache.CodeCache:
    return code_cache.load_or_encode(
        folder,
        model,
        split,
        loading=DataSettings(workers=workers),
        views=views,
        name="val",
        data="d" * 64,
        tokenizer=tokenizer,
        batch_size=5,
        device=CPU,
        ranks=ranks,
        console=console or Console(quiet=True),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_hand(image: np.ndarray) -> list[Image.Image]:
    """The views of MANY, with Pillow alone."""
    crops = []
    for short in (24, 20):
        height, width = (round(side * short / 16) for side in image.shape[:2])
        whole = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
        left = (width - short) // 2
        far = short - 16
        for x, y in [(0, 0), (far, 0), (0, far), (far, far), (far // 2, far // 2)]:
            crops.append(whole.crop((left + x, y, left + x + 16, y + 16)))
    return [*crops, *map(ImageOps.mirror, crops)]


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_it_holds_the_codes_of_every_image_and_its_label(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    cache = make(tmp_path / "tokens", model, split)
    assert (len(cache), cache.codes.shape) == (12, (12, 8, 8, 4))
    assert cache.codes.dtype == np.uint16
    for index in range(12):
        image = pixels.from_array(split.pixels(index)[:, 2:18])
        codes = model.encode(pixels.to_signed(image)[None])[0]
        assert np.array_equal(cache.codes[index], codes)
    assert cache.labels is not None and split.labels is not None
    assert np.array_equal(cache.labels, split.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_view_has_the_codes_of_that_crop_or_mirror_image(
    tmp_path: Path, model: Tokenizer, split: Split, workers: int
) -> None:
    cache = make(tmp_path / "tokens", model, split, MANY, workers=workers)
    assert len(cache) == 12 * 20
    for index in (0, 7, 11):
        for number, view in enumerate(by_hand(split.pixels(index))):
            codes = model.encode(pixels.to_signed(pixels.from_array(np.asarray(view)))[None])[0]
            assert np.array_equal(cache.codes[index * 20 + number], codes), (index, number)
    assert cache.labels is not None and split.labels is not None
    assert cache.labels.tolist() == [label for label in split.labels for _ in range(20)]


def test_a_set_without_classes_has_no_labels(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    unlabelled = Split(split.paths, (), None, split.extents)
    assert make(tmp_path / "tokens", model, unlabelled, ViewSettings(mirror=True)).labels is None


# --- which one is taken -----------------------------------------------------------------------------------------------


def test_it_is_made_once(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    make(tmp_path / "tokens", model, split)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").rglob("*.*")}
    assert {path.name for path in made} == {"codes.npy", "labels.npy", "header.json"}
    make(tmp_path / "tokens", model, split)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").rglob("*.*")} == made


def test_one_without_its_header_is_made_again(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    codes = np.array(make(tmp_path / "tokens", model, split).codes)
    (folder,) = (tmp_path / "tokens").iterdir()
    (folder / "header.json").unlink()
    (folder / "codes.npy").write_bytes(b"half")
    assert np.array_equal(make(tmp_path / "tokens", model, split).codes, codes)


def test_another_tokenizers_codes_are_made_again(
    tmp_path: Path, model: Tokenizer, split: Split, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "tokens", model, split)
    assert make(tmp_path / "tokens", model, split, tokenizer="u" * 64).header.tokenizer == "u" * 64
    assert "were made by another tokenizer; they are made again" in capsys.readouterr().err
    make(tmp_path / "reference", model, split, tokenizer="u" * 64)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "reference")


def test_a_damaged_header_is_named(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    make(tmp_path / "tokens", model, split)
    (folder,) = (tmp_path / "tokens").iterdir()
    (folder / "header.json").write_text("{")
    with pytest.raises(BadRequestError, match=folder.name):
        make(tmp_path / "tokens", model, split)


def test_other_views_have_a_cache_of_their_own(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    every = [PLAIN, ViewSettings(mirror=True), ViewSettings(scales=(1.5,)), MANY]
    assert [len(make(tmp_path / "tokens", model, split, views)) for views in every] == [12, 24, 60, 240]
    assert [len(make(tmp_path / "tokens", model, split, views)) for views in every] == [12, 24, 60, 240]
    names = {folder.name for folder in (tmp_path / "tokens").iterdir()}
    assert names == {f"dddddddddddd-val{views}" for views in ("", "-mirror", "-1.5", "-1.5-1.25-mirror")}


def test_a_cache_of_other_views_under_this_ones_name_is_refused(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    make(tmp_path / "tokens", model, split, ViewSettings(mirror=True))
    (folder,) = (tmp_path / "tokens").iterdir()
    folder.rename(tmp_path / "tokens" / "dddddddddddd-val")
    with pytest.raises(BadRequestError, match=r"other images or views.*views, view_settings.*Remove the folder"):
        make(tmp_path / "tokens", model, split)


def test_a_cache_without_digests_is_refused_and_encoded_anew(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    made = make(tmp_path / "tokens", model, split)
    (header,) = (tmp_path / "tokens").glob("*/header.json")
    values = json.loads(header.read_text())
    del values["digest"], values["files"]
    header.write_text(json.dumps(values))
    with pytest.raises(BadRequestError, match=r"older version of movq: codes.npy has no digest. Remove the folder"):
        make(tmp_path / "tokens", model, split)
    shutil.rmtree(header.parent)
    np.testing.assert_array_equal(make(tmp_path / "tokens", model, split).codes, made.codes)


# --- interrupted and shared -------------------------------------------------------------------------------------------


@contextmanager
def stopped_at_write(number: int) -> Iterator[None]:
    """Ctrl-C in place of a write, counted from 0."""
    left = iter(range(number))

    def stopping(write: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **named: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return write(*arguments, **named)

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (code_cache, "atomic_file"),
            (digests, "write_header"),
            (code_cache, "_clear"),
            (blocks, "atomic_file"),
        ):
            patch.setattr(module, name, stopping(getattr(module, name)))
        yield


def test_a_cache_stopped_before_any_write_is_resumed_and_encodes_no_block_twice(
    tmp_path: Path, model: Tokenizer, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = ViewSettings(mirror=True)
    monkeypatch.setattr(code_cache, "BLOCK_VIEWS", 7)  # three images: 4 blocks
    make(tmp_path / "whole", model, split, views)
    encoded: list[range] = []
    save = Blocks._save

    def save_and_record(self: Blocks, block: range, arrays: Arrays) -> None:
        save(self, block, arrays)
        encoded.append(block)

    monkeypatch.setattr(Blocks, "_save", save_and_record)
    for number in range(9):  # begun.json, four blocks, codes, labels, header, tidying up
        encoded.clear()
        with stopped_at_write(number), pytest.raises(KeyboardInterrupt):
            make(tmp_path / str(number), model, split, views)
        make(tmp_path / str(number), model, split, views)
        assert len(encoded) == len(set(encoded)) == 4
        assert contents(tmp_path / str(number)) == contents(tmp_path / "whole")
    with stopped_at_write(9):
        make(tmp_path / "last", model, split, views)


def test_what_another_tokenizer_began_is_not_gone_on_with(tmp_path: Path, model: Tokenizer, split: Split) -> None:
    with stopped_at_write(2), pytest.raises(KeyboardInterrupt):
        make(tmp_path / "tokens", model, split)
    make(tmp_path / "tokens", model, split, tokenizer="u" * 64)
    make(tmp_path / "reference", model, split, tokenizer="u" * 64)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "reference")


def test_blocks_of_another_size_are_encoded_anew(
    tmp_path: Path, model: Tokenizer, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole", model, split)
    monkeypatch.setattr(code_cache, "BLOCK_VIEWS", 5)
    with stopped_at_write(3), pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts", model, split)
    monkeypatch.setattr(code_cache, "BLOCK_VIEWS", 4)
    make(tmp_path / "parts", model, split)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


class Counting(Console):
    """Records the reported progress, including the count at the start."""

    count = 0

    @contextmanager
    def progress(
        self, total: int, activity: str, unit: str, done: int = 0, *, brief: bool = False
    ) -> Iterator[Counting]:
        assert (total, activity, unit) == (960, "encoding val", "image views")
        self.count = done
        yield self

    def advance(self, count: int = 1, figures: Mapping[str, str] | None = None) -> None:
        self.count += count


def encode(ranks: Ranks, given: tuple[Preset, PreparedSet, Path, float]) -> int:
    """Encode 960 views in 48 blocks; a pause after each leaves time to be killed. Returns the progress."""
    preset, images, folder, pause = given
    save = Blocks._save

    def slowly(self: Blocks, block: range, arrays: Arrays) -> None:
        save(self, block, arrays)
        time.sleep(pause)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_cache, "BLOCK_VIEWS", 20)
        patch.setattr(Blocks, "_save", slowly)
        console = Counting(quiet=True)
        assert len(make(folder, untrained(preset), images.split("train"), MANY, ranks=ranks, console=console)) == 960
        return console.count


def count_blocks(folder: Path) -> int:
    return len(list(folder.glob("*/blocks/*.npz")))


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_any_moment_it_is_finished_by_one_process_with_the_same_bytes(
    tmp_path: Path, tiny: Preset, prepared: PreparedSet, world: int
) -> None:
    assert encode(SINGLE_PROCESS, (tiny, prepared, tmp_path / "whole", 0.0)) == 960
    processes = start_ranks(encode, (tiny, prepared, tmp_path / "parts", 0.05), tmp_path, world)
    while not count_blocks(tmp_path / "parts"):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.5))
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    left = count_blocks(tmp_path / "parts")
    assert 0 < left < 48
    assert encode(SINGLE_PROCESS, (tiny, prepared, tmp_path / "parts", 0.0)) == 960
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole"), f"{left} blocks were left"


def test_two_ranks_finish_what_one_process_began_with_the_bytes_that_it_would_have_made(
    tmp_path: Path, tiny: Preset, prepared: PreparedSet
) -> None:
    encode(SINGLE_PROCESS, (tiny, prepared, tmp_path / "whole", 0.0))
    with stopped_at_write(5), pytest.raises(KeyboardInterrupt):
        encode(SINGLE_PROCESS, (tiny, prepared, tmp_path / "parts", 0.0))
    assert count_blocks(tmp_path / "parts") == 4
    counts = on_ranks(encode, (tiny, prepared, tmp_path / "parts", 0.0), tmp_path, world=2)
    # Both begin with what was there; rank 0, which speaks, counts the other's blocks too.
    assert counts == [960, 80 + 22 * 20]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
