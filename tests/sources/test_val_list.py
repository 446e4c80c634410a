"""A list of held-out images as VQGAN publishes it for FFHQ, and lists that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from movq_cli.errors import BadRequestError
from movq_cli.sources.open import open_source
from movq_cli.sources.splits import split_images


def held_out(folder: Path, val_list: Path) -> list[str]:
    source = open_source(str(folder))
    splits = split_images(source, "0.1", val_list, lambda _: True)
    return [source.names[index] for index in splits["val"]]


@pytest.fixture
def ffhq(tmp_path: Path) -> Path:
    """A folder of images as FFHQ has them: `47000/47234.png`."""
    for number in (19351, 35914, 47234, 47235, 69674, 69675):
        path = tmp_path / "ffhq" / f"{number // 1000 * 1000:05d}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(path)
    return tmp_path / "ffhq"


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_vqgans_list_of_names_finds_the_images_in_ffhqs_folders(ffhq: Path, start: bytes) -> None:
    listed = ffhq.parent / "ffhqvalidation.txt"
    listed.write_bytes(start + b"47234.png\n19351.png\r\n69674.png\n")
    assert held_out(ffhq, listed) == ["19000/19351.png", "47000/47234.png", "69000/69674.png"]


def test_a_list_that_does_not_exist_is_refused(ffhq: Path) -> None:
    with pytest.raises(BadRequestError, match=r"cannot read the list .*nowhere.txt: No such file"):
        held_out(ffhq, ffhq.parent / "nowhere.txt")


def test_a_list_beside_a_val_split_of_the_source_is_refused_and_the_remedy_works(ffhq: Path, tmp_path: Path) -> None:
    source = tmp_path / "both"
    source.mkdir()
    ffhq.rename(source / "train")
    (source / "val").mkdir()
    Image.new("RGB", (8, 8)).save(source / "val" / "1.png")
    listed = tmp_path / "list.txt"
    listed.write_text("47234.png\n")
    with pytest.raises(BadRequestError, match="has a val split of its own, beside which --val-list") as error:
        held_out(source, listed)
    assert "train folder" in str(error.value)
    assert held_out(source / "train", listed) == ["47000/47234.png"]
