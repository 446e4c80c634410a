"""`movq prepare` for a set that exists says what it compared, and what differs from the source of today."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from movq_cli.commands import prepare_plan, prepared
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError, FailureError
from tests.sources.files import fill, picture, tarred, zipped

NAMES = [f"{number}.png" for number in range(10)]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_plan, "SHARD_IMAGES", 4)


@pytest.fixture
def request_(tmp_path: Path) -> PrepareRequest:
    """The request of a set with four shards and one rejected image, which has been made."""
    fill(tmp_path / "in", *NAMES)
    (tmp_path / "in" / "x.png").write_bytes(b"no image")
    request = PrepareRequest(str(tmp_path / "in"), tmp_path / "out", val="3")
    prepare(request, Console(quiet=True))
    return request


def age(path: Path) -> None:
    """Give a file another time of change, as copying it does."""
    os.utime(path, ns=(1, path.stat().st_mtime_ns - 10**9))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_replaced_image_is_named_and_the_remedy_works(request_: PrepareRequest, workers: int) -> None:
    image = Path(request_.source) / "4.png"
    before = image.read_bytes()
    image.write_bytes(picture(99))
    age(image)
    again = PrepareRequest(request_.source, request_.out, val="3", workers=workers)
    with pytest.raises(
        BadRequestError, match=r"1 of the 11 images of .* have changed since .* such as 4\.png.*Remove .*out and run"
    ):
        prepare(again, Console(quiet=True))
    image.write_bytes(before)
    prepare(again, Console(quiet=True))
    image.write_bytes(picture(99))
    shutil.rmtree(request_.out)
    prepare(again, Console(quiet=True))
    prepare(again, Console(quiet=True))


def test_a_rejected_image_that_was_repaired_and_a_good_one_that_was_damaged_are_found(request_: PrepareRequest) -> None:
    (Path(request_.source) / "x.png").write_bytes(picture(50))
    with pytest.raises(BadRequestError, match=r"such as x\.png"):
        prepare(request_, Console(quiet=True))
    (Path(request_.source) / "x.png").write_bytes(b"no image either")
    prepare(request_, Console(quiet=True))
    (Path(request_.source) / "0.png").write_bytes(b"")
    with pytest.raises(BadRequestError, match=r"such as 0\.png"):
        prepare(request_, Console(quiet=True))


def test_images_that_were_only_copied_are_compared_by_content_once(
    request_: PrepareRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        age(Path(request_.source) / name)
    prepare(request_, Console())
    assert "and the content of 10 of them" in capsys.readouterr().err
    prepare(request_, Console())
    assert "names, sizes and times of change of the images were compared" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_a_missing_or_damaged_shard_is_made_again_by_the_same_command_alone(
    request_: PrepareRequest, damage: Callable[[Path], None]
) -> None:
    path = request_.out / "train" / "00001.zip"
    made = path.read_bytes()
    damage(path)
    with pytest.raises(BadRequestError, match=r"00001\.zip .*Run the same `movq prepare` again: it makes damaged and"):
        PreparedSet.open(request_.out)
    prepare(request_, Console(quiet=True))
    assert path.read_bytes() == made
    PreparedSet.open(request_.out)


def test_a_shard_of_another_set_is_made_again(request_: PrepareRequest, tmp_path: Path) -> None:
    other = PrepareRequest(request_.source, tmp_path / "other", Preprocessing(size=8), val="3")
    prepare(other, Console(quiet=True))
    path = request_.out / "train" / "00000.zip"
    made = path.read_bytes()
    shutil.copy(tmp_path / "other" / "train" / "00000.zip", path)
    with pytest.raises(BadRequestError, match="belongs to another set"):
        PreparedSet.open(request_.out)
    prepare(request_, Console(quiet=True))
    assert path.read_bytes() == made


def test_a_replaced_image_of_an_unfinished_set_is_found_in_the_shards_that_exist(request_: PrepareRequest) -> None:
    (request_.out / "manifest.json").unlink()
    (Path(request_.source) / "4.png").write_bytes(picture(99))
    with pytest.raises(BadRequestError, match=r"such as 4\.png"):
        prepare(request_, Console(quiet=True))
    for path in request_.out.glob("*/*.zip"):
        path.unlink()
    prepare(request_, Console(quiet=True))
    prepare(request_, Console(quiet=True))


def test_added_and_removed_images_and_another_size_are_said(request_: PrepareRequest) -> None:
    folder = Path(request_.source)
    with pytest.raises(BadRequestError, match=r"another source or other settings \(size was null and is 8; see"):
        prepare(PrepareRequest(request_.source, request_.out, Preprocessing(size=8), val="3"), Console(quiet=True))
    with pytest.raises(BadRequestError, match=r"\(the split, the classes or the labels differ; see"):
        prepare(PrepareRequest(request_.source, request_.out, val="2"), Console(quiet=True))
    (folder / "7.png").rename(folder / "y.png")
    with pytest.raises(
        BadRequestError, match=r"1 images were added, such as y\.png; 1 images were removed, such as 7\.png"
    ):
        prepare(request_, Console(quiet=True))
    (request_.out / "sources.json").unlink()
    (folder / "3.png").unlink()
    with pytest.raises(BadRequestError, match=r"it was made from 11 images, and the source has 10"):
        prepare(request_, Console(quiet=True))


def test_without_the_record_less_is_compared_and_a_damaged_one_is_written_again(
    request_: PrepareRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    record = request_.out / "sources.json"
    made = record.read_bytes()
    record.write_bytes(made[:-20])
    with pytest.raises(FailureError, match="run the same `movq prepare` again"):
        prepared.check(request_.out, workers=1, console=Console())
    assert "sources.json: is damaged" in capsys.readouterr().err
    prepare(request_, Console())
    assert "and the content of 11 of them" in capsys.readouterr().err and record.read_bytes() == made
    record.unlink()
    prepare(request_, Console())
    assert "the times of change of the images are not recorded" in capsys.readouterr().err


@pytest.mark.parametrize("write", [zipped, tarred])
def test_a_replaced_image_of_an_archive_is_named(tmp_path: Path, write: Callable[..., Path]) -> None:
    files = {name: picture(value) for value, name in enumerate(NAMES)}
    request = PrepareRequest(str(write(tmp_path / "a.x", files)), tmp_path / "out", val="3")
    prepare(request, Console(quiet=True))
    age(write(tmp_path / "a.x", files))
    prepare(request, Console(quiet=True))
    write(tmp_path / "a.x", {**files, "6.png": picture(99)})
    with pytest.raises(BadRequestError, match=r"1 of the 10 images of .* such as 6\.png"):
        prepare(request, Console(quiet=True))
