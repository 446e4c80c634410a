"""Several archives that are one source, archives that are not read, and array files that hold no images."""

from __future__ import annotations

import json
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from movq_cli.errors import BadRequestError
from movq_cli.sources.open import open_source
from tests.sources.files import fill, picture, tarred, written, zipped

Packed = Callable[[Path, Mapping[str, bytes]], Path]
PACKED = pytest.mark.parametrize(("packed", "suffix"), [(zipped, ".zip"), (tarred, ".tar")])


def images(*names: str) -> dict[str, bytes]:
    return {name: picture(value) for value, name in enumerate(names)}


@PACKED
def test_a_folder_of_archives_has_every_image_of_each_under_a_name_of_its_own(
    tmp_path: Path, packed: Packed, suffix: str
) -> None:
    for number in range(3):
        packed(tmp_path / f"part-{number}{suffix}", {"cat/0.png": picture(number), "dog/1.png": picture(9 + number)})
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path))))
    assert source.names == tuple(f"part-{n}/{file}" for n in range(3) for file in ("cat/0.png", "dog/1.png"))
    assert source.classes == ("cat", "dog") and source.labels == (0, 1) * 3
    assert [source.read(index) for index in range(6)] == [picture(v) for n in range(3) for v in (n, 9 + n)]
    assert source.warnings == source.label_warnings == ()


@PACKED
def test_the_names_of_archives_give_the_splits(tmp_path: Path, packed: Packed, suffix: str) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        packed(tmp_path / split / f"0{suffix}", images("cat/0.png", "dog/0.png"))
    source = open_source(str(tmp_path))
    assert source.splits == ("train", "train", "val", "val") and source.classes == ("cat", "dog")
    assert "2 images of the test split were left out" in source.warnings[0]


def test_archives_whose_files_begin_with_their_name_are_classes(tmp_path: Path) -> None:
    for synset in ("n01440764", "n01443537"):
        tarred(tmp_path / f"{synset}.tar", images(f"{synset}_36.JPEG", f"{synset}_48.JPEG"))
    source = open_source(str(tmp_path))
    assert source.classes == ("n01440764", "n01443537") and source.labels == (0, 0, 1, 1)


@PACKED
def test_names_of_archives_that_are_not_used_as_classes_are_said(tmp_path: Path, packed: Packed, suffix: str) -> None:
    for name in ("cats", "dogs"):
        packed(tmp_path / f"{name}{suffix}", images("0.png", "1.png"))
    source = open_source(str(tmp_path))
    assert source.labels is None and len(source) == 4
    assert "the names of the 2 archives, such as cats, are not used as classes" in source.label_warnings[0]
    for name in ("cats", "dogs"):  # The remedy of the warning.
        fill(tmp_path / "extracted" / name, "0.png", "1.png")
    assert open_source(str(tmp_path / "extracted")).classes == ("cats", "dogs")


def test_nvidias_labels_in_several_zips_count(tmp_path: Path) -> None:
    for number in range(2):
        index = json.dumps({"labels": [["a.png", number], ["b.png", 2]]}).encode()
        zipped(tmp_path / f"{number}.zip", {**images("a.png", "b.png"), "dataset.json": index})
    source = open_source(str(tmp_path))
    assert source.labels == (0, 2, 1, 2) and source.warnings == ()


def test_compressed_tars_in_a_folder_are_read_unless_images_lie_beside_them(tmp_path: Path) -> None:
    fill(tmp_path / "files", "0.png")
    for name in ("a.tar.gz", "b.tgz"):
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            archive.add(tmp_path / "files" / "0.png", "0.png")
    source = open_source(str(tmp_path))
    assert source.names == ("files/0.png",) and "1 .gz, 1 .tgz (extract .gz .tgz, or name" in source.warnings[0]
    (tmp_path / "files" / "0.png").unlink()
    assert open_source(str(tmp_path)).names == ("a/0.png", "b/0.png")


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", images("a.png")).read_bytes()
    files = {"0.png": picture(0), "inner.zip": inner}
    assert open_source(str(tarred(tmp_path / "outer", files))).names == ("0.png",)
    with tarfile.open(tmp_path / "outer.tgz", "w:gz", compresslevel=0) as archive:
        for name, data in files.items():
            archive.add(written(tmp_path / "files", {name: data}) / name, name)
    assert open_source(str(tmp_path / "outer.tgz")).names == ("0.png",)


def test_what_lies_beside_archives_is_counted(tmp_path: Path) -> None:
    tarred(tmp_path / "a.tar", images("0.png"))
    zipped(tmp_path / "b.zip", images("1.png"))
    written(tmp_path, {"labels.csv": b"0.png,cat", ".hidden": b""})
    (warning,) = open_source(str(tmp_path)).warnings
    assert "2 files that are no readable images were left out: 1 .csv, 1 .zip (extract .zip, or name" in warning


@PACKED
@pytest.mark.parametrize("inner", [zipped, tarred])
def test_an_archive_in_another_source_is_counted_with_a_remedy_that_works(
    tmp_path: Path, packed: Packed, suffix: str, inner: Packed
) -> None:
    inside = inner(tmp_path / "inside", images("a.png", "b.png"))
    files = {"0.png": picture(0), "part.zip": inside.read_bytes(), "more/x.7z": b"7z"}
    outer = packed(tmp_path / f"outer{suffix}", files)
    source = open_source(str(outer))
    assert source.names == ("0.png",)
    assert "2 files that are no readable images were left out: 1 .7z, 1 .zip" in source.warnings[0]
    assert "(extract .7z .zip, or name one of them as the source" in source.warnings[0]
    assert open_source(str(inside)).names == ("a.png", "b.png")
    assert packed(tmp_path / f"only{suffix}", {"part.zip": files["part.zip"]}).is_file()
    with pytest.raises(BadRequestError, match=r"it holds 1 \.zip \(extract \.zip, or name one of them"):
        open_source(str(tmp_path / f"only{suffix}"))


def test_a_broken_zip_among_others_is_named(tmp_path: Path) -> None:
    zipped(tmp_path / "a.zip", images("0.png"))
    (tmp_path / "b.zip").write_bytes(b"<html>")
    with pytest.raises(BadRequestError, match=r"cannot read the zip archive .*b\.zip"):
        open_source(str(tmp_path))


def test_an_array_file_without_images_says_what_it_holds_and_the_remedy_works(tmp_path: Path) -> None:
    pixels = np.zeros((2, 9, 9, 3), np.uint8)
    np.savez(tmp_path / "named.npz", samples=pixels, y=np.zeros(2))
    with pytest.raises(BadRequestError, match=r"named\.npz holds the arrays samples, y, and no arr_0"):
        open_source(str(tmp_path / "named.npz"))
    np.save(tmp_path / "alone.npy", pixels)
    with pytest.raises(BadRequestError, match=r"alone\.npy is an array alone, .*numpy\.savez\(FILE, images\)"):
        open_source(str(tmp_path / "alone.npy"))
    np.savez(tmp_path / "remedy.npz", pixels)
    assert len(open_source(str(tmp_path / "remedy.npz"))) == 2
