"""No output replaces what is read, and output inside a source is not read as a part of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from movq_cli.commands.code_maps import find_maps
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.sources.open import open_source
from movq_cli.sources.output_mark import OUTPUT_MARK
from movq_cli.sources.outputs import protect_source, refuse_collisions, refuse_replaced
from tests.sources.files import fill, zipped


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "photos", "a/1.png", "a/2.jpg", "b/3.png")
    return Path("photos")


def protect(location: str, *folders: str, pictures: tuple[str, ...] = (), also_read: tuple[str, ...] = ()) -> None:
    """Protect a source whose output has the names of its images."""
    source = open_source(location)
    outs = [Path(folder) for folder in folders]
    files = [outs[0] / Path(name).with_suffix(".png") for name in source.names]
    protect_source(source, outs, files, pictures=list(map(Path, pictures)), also_read=list(map(Path, also_read)))


@pytest.mark.parametrize(
    ("location", "out"),
    [
        ("photos", "photos"),
        ("photos", "./photos/../photos/"),
        ("photos", "link"),
        ("link", "photos"),
        ("photos", "photos/a"),
        ("photos/a/1.png", "photos/a"),
        ("photos/a/2.jpg", "photos/a"),
        ("list.txt", "."),
        ("linked", "photos"),
        ("data.zip", "."),
    ],
)
def test_output_that_would_replace_what_is_read_is_refused(photos: Path, location: str, out: str) -> None:
    Path("link").symlink_to("photos")
    Path("list.txt").write_text("photos/a/1.png\nphotos/b/3.png\n")
    Path("linked/a").mkdir(parents=True)
    Path("linked/a/1.png").symlink_to(Path("photos/a/1.png").resolve())
    zipped(Path("data.zip"), {"data.zip": b"", "1.png": Path("photos/a/1.png").read_bytes()})
    with pytest.raises(BadRequestError, match=r"holds the images that are read|is read, so that it cannot"):
        protect(location, out)
    assert not list(Path().rglob(OUTPUT_MARK))


def test_other_files_than_the_images_may_be_in_the_output_folder(photos: Path) -> None:
    fill(Path("out"), "a/1.png", "x.png")
    protect("photos", "out")
    shutil.copytree("photos", "copy")
    protect("photos", "copy")
    Path("hard/a").mkdir(parents=True)
    (Path("hard/a/1.png")).hardlink_to("photos/a/1.png")  # A name is replaced, and not the bytes of the other name.
    protect("photos", "hard")
    assert not list(Path().rglob(OUTPUT_MARK))


def test_output_inside_the_source_is_not_read_the_next_time(photos: Path) -> None:
    names = open_source("photos").names
    for _ in range(2):
        protect("photos", "photos/out", "photos/a/codes")
        shutil.copytree("photos/b", "photos/out/b", dirs_exist_ok=True)
        np.save("photos/a/codes/1.npy", np.zeros(1))
        source = open_source("photos")
        assert source.names == names and source.warnings == ("output of movq was left out: a/codes/, out/",)
        assert open_source(".").names == tuple(f"photos/{name}" for name in names)
        assert find_maps(Path("photos")) == [] and len(find_maps(Path("photos/a/codes"))) == 1
    assert open_source("photos/out").names == ("b/3.png",)
    shutil.move("photos/out", "out")
    assert open_source("out").names == ("b/3.png",)
    (Path("photos/a/codes") / OUTPUT_MARK).write_bytes(b"\xff")
    assert open_source("photos").names == names


def test_output_of_another_source_is_an_ordinary_folder(photos: Path) -> None:
    protect("photos", "photos/out")
    fill(Path("photos/out"), "x.png")
    shutil.copytree("photos/out", "elsewhere/recon/out")
    assert open_source("elsewhere/recon/out").names == ("x.png",)
    with pytest.raises(BadRequestError, match=r"holds no image but in the output of movq: out/\. Name one of these"):
        open_source("elsewhere/recon")
    assert open_source("photos/out").names == ("x.png",)


def test_a_picture_replaces_no_image_and_becomes_none(photos: Path) -> None:
    for picture in ("photos/b/3.png", "photos/grid.png", "photos/new/grid.png"):
        with pytest.raises(BadRequestError, match=r"Choose another path for it"):
            protect("photos", "out", pictures=(picture,))
    with pytest.raises(BadRequestError, match=r"mask\.png is read"):
        fill(Path("out"), "mask.png")
        protect("photos", "out2", pictures=("out/mask.png",), also_read=("out/mask.png",))
    protect("photos", "photos/out", pictures=("photos/out/grid.png", "grid.png"))
    shutil.rmtree("photos/out")
    protect("photos", "out2", pictures=("grid.png",))


def test_a_mask_is_not_replaced(photos: Path) -> None:
    fill(Path("out"), "a/1.png")
    with pytest.raises(BadRequestError, match=r"out/a/1\.png is read"):
        protect("photos", "out", also_read=("out/a/1.png",))


def test_a_file_that_is_read_is_not_written(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path / "x" / ".." / "a.png", tmp_path / "link.png"):
        with pytest.raises(BadRequestError, match="is read"):
            refuse_replaced([path], [tmp_path / "a.png"])
    refuse_replaced([tmp_path / "b.png"], [tmp_path / "a.png"])


def test_a_set_prepared_inside_its_source_is_not_counted_as_files_of_it(photos: Path) -> None:
    for _ in range(2):
        prepare(PrepareRequest("photos", Path("photos/set"), val="1"), Console(quiet=True))
        assert open_source("photos").warnings == ("output of movq was left out: set/",)


@pytest.mark.parametrize(
    ("files", "picture", "says"),
    [
        (["out/a.png", "out/b.png", "out/a.png"], None, "the outputs of two images would have the name out/a.png"),
        (["out/a.png", "out/a.png/1.png"], None, "out/a.png would be the output of an image, and the folder of"),
        (["out/a.png", "out/a.png/b/c/1.png"], None, "out/a.png would be the output of an image, and the folder of"),
        (["out/a.png", "out/b/c.png"], "out/a.png", "the picture out/a.png would have the name of the output"),
        (["out/a.png", "out/b/c.png"], "out/../link/b/c.png", "the picture out/../link/b/c.png would have the name"),
        (["out/a.png", "out/b.png/c.png"], "out/b.png", "the picture out/b.png would have the name of the output"),
        (["out/a.png", "out/a.png.png", "out/a/a.png"], "out/b.png", None),
        (["out/a.png"], "a.png", None),
        ([], "a.png", None),
    ],
)
def test_no_output_takes_the_place_of_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], picture: str | None, says: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("link").symlink_to("out")
    pictures = [] if picture is None else [Path(picture)]
    if says is None:
        refuse_collisions(list(map(Path, files)), pictures)
    else:
        with pytest.raises(BadRequestError, match=re.escape(says)):
            refuse_collisions(list(map(Path, files)), pictures)


def test_a_folder_in_the_place_of_an_output_is_refused_before_the_work(photos: Path) -> None:
    Path("out/a/1.png").mkdir(parents=True)
    with pytest.raises(BadRequestError, match=r"out/a/1\.png is a folder, so that it cannot be a file"):
        protect("photos", "out")
    protect("photos", "other")
