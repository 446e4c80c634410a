"""Files beside images say what the images show: they are used, or a warning says why not."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.sources.open import open_source
from tests.sources.files import fill, picture, tarred, written, zipped
from tests.sources.test_layout import classes_of

Write = Callable[[Path, Mapping[str, bytes]], Path]
WRITERS: list[Write] = [written, zipped, tarred]
NUMBERED = [f"{number // 4:05d}/img{number:08d}.png" for number in range(12)]


def numbered(index: object) -> dict[str, bytes]:
    """Return twelve images in three folders of four, and a `dataset.json`."""
    images = {name: picture(value) for value, name in enumerate(NUMBERED)}
    return {**images, "dataset.json": index if isinstance(index, bytes) else json.dumps(index).encode()}


@pytest.mark.parametrize("write", WRITERS)
def test_nvidias_labels_count_and_not_the_folders(tmp_path: Path, write: Write) -> None:
    labels = [[name, number % 3] for number, name in enumerate(NUMBERED)]
    for form in (labels[::-1], {name: number % 3 for number, name in enumerate(NUMBERED)}):
        source = open_source(str(write(tmp_path / type(form).__name__, numbered({"labels": form}))))
        assert source.labels == tuple(number % 3 for number in range(12)) and source.classes == ("0", "1", "2")
        assert source.warnings == source.label_warnings == ()


@pytest.mark.parametrize("write", WRITERS)
def test_nvidias_null_means_no_classes(tmp_path: Path, write: Write) -> None:
    source = open_source(str(write(tmp_path / "x", numbered({"labels": None}))))
    assert source.labels is None and source.warnings == source.label_warnings == ()


def test_nvidias_labels_below_a_folder_and_of_a_split(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("val", 2)):
        labels = [[name, first + number % 2] for number, name in enumerate(NUMBERED)]
        written(tmp_path / "in" / split, numbered({"labels": labels}))
    source = open_source(str(tmp_path))
    assert source.splits is not None and source.labels is not None
    assert {(split, label) for split, label in zip(source.splits, source.labels, strict=True)} == {
        ("train", 0),
        ("train", 1),
        ("val", 2),
        ("val", 3),
    }


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"labels": [[name, 1] for name in NUMBERED[1:]]}, f"1 of 12 images have no class, such as {NUMBERED[0]}"),
        ({"labels": [[name, -1] for name in NUMBERED]}, "no numbers or names of classes"),
        ({"labels": [[name, "a" if name < NUMBERED[3] else 2] for name in NUMBERED]}, "no numbers or names"),
    ],
)
def test_labels_that_cannot_be_used_are_said(tmp_path: Path, index: object, says: str) -> None:
    source = open_source(str(zipped(tmp_path / "a.zip", numbered(index))))
    assert source.labels is None and says in source.label_warnings[0] and "--no-labels" in source.label_warnings[0]


@pytest.mark.parametrize("index", [b"{", b"[]", b"[" * 100_000, {"label": 1}, {"labels": 3}, {"labels": [["x", [1]]]}])
def test_another_file_of_that_name_is_counted_as_unread(tmp_path: Path, index: object) -> None:
    source = open_source(str(zipped(tmp_path / "a.zip", numbered(index))))
    assert source.labels is None and "1 .json" in source.warnings[0]


def test_our_own_shards_come_back_with_their_labels(tmp_path: Path) -> None:
    fill(tmp_path / "in", *(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(5)))
    prepare(PrepareRequest(str(tmp_path / "in"), tmp_path / "out", val="3"), Console(quiet=True))
    labels = PreparedSet.open(tmp_path / "out").split("train").labels
    assert labels is not None
    assert open_source(str(tmp_path / "out/train/00000.zip")).labels == tuple(labels.tolist())
    with zipfile.ZipFile(tmp_path / "out/train/00000.zip") as archive:
        archive.extractall(tmp_path / "extracted")
    assert open_source(str(tmp_path / "extracted")).labels == tuple(labels.tolist())


TINY = {
    **{f"train/n0{k}/images/n0{k}_{i}.JPEG": picture(k) for k in (1, 2, 3) for i in range(2)},
    **{f"val/images/val_{i}.JPEG": picture(i) for i in range(4)},
    **{f"test/images/test_{i}.JPEG": picture(i) for i in range(3)},
}
ANNOTATIONS = b"".join(b"val_%d.JPEG\tn0%d\t0\t32\t44\t62\n" % (i, 1 + i % 3) for i in range(4))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("top", ["", "tiny-imagenet-200/"])
def test_tiny_imagenet_as_it_is_distributed(tmp_path: Path, write: Write, top: str) -> None:
    files = {top + name: data for name, data in {**TINY, "val/val_annotations.txt": ANNOTATIONS}.items()}
    source = open_source(str(write(tmp_path / "x", files)))
    assert source.classes == ("n01", "n02", "n03") and len(source) == 10
    found = {name.split("/")[-1]: known for name, known in classes_of(source).items()}
    assert {name: known for name, known in found.items() if name.startswith("val")} == {
        f"val_{i}.JPEG": f"n0{1 + i % 3}" for i in range(4)
    }
    assert source.label_warnings == () and "3 images of the test split" in source.warnings[0]


def test_tiny_imagenets_list_can_be_named_too(tmp_path: Path) -> None:
    written(tmp_path / "in", TINY)
    (tmp_path / "val_annotations.txt").write_bytes(ANNOTATIONS)
    request = PrepareRequest(
        str(tmp_path / "in"), tmp_path / "out", val_labels=tmp_path / "val_annotations.txt", keep_labels=True
    )
    prepare(request, Console(quiet=True))
    made = PreparedSet.open(tmp_path / "out")
    assert made.manifest.classes == ("n01", "n02", "n03") and made.manifest.counts == {"train": 6, "val": 4}
    labels = made.split("val").labels
    assert labels is not None and labels.tolist() == [0, 1, 2, 0]


def test_kaggles_list_beside_the_images_is_used(tmp_path: Path) -> None:
    images = {
        **{f"ILSVRC/Data/CLS-LOC/train/n0{k}/n0{k}_1.JPEG": picture(k) for k in (1, 2)},
        **{f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_0000000{i}.JPEG": picture(i) for i in (1, 2)},
        "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG": picture(0),
    }
    solution = b"ImageId,PredictionString\n" + b"".join(
        b"ILSVRC2012_val_0000000%d,n0%d 85 1 499 272 \n" % (i, 3 - i) for i in (1, 2)
    )
    source = open_source(str(written(tmp_path, {**images, "LOC_val_solution.csv": solution})))
    assert list(classes_of(source).values()) == ["n01", "n02", "n02", "n01"]


def test_a_list_that_does_not_fit_is_said(tmp_path: Path) -> None:
    written(tmp_path, {**TINY, "val/val_annotations.txt": ANNOTATIONS[:20]})
    source = open_source(str(tmp_path))
    assert source.labels is None
    assert "val/val_annotations.txt were not used" in source.label_warnings[0]
    assert "--val-labels" in source.label_warnings[1]


# WebDataset


def test_names_of_classes_in_json_or_cls_files_are_used(tmp_path: Path) -> None:
    for suffix, form in (("json", '{"label": "%s"}'), ("cls", "%s\n")):
        files: dict[str, bytes] = {}
        for number in range(4):
            files |= {f"{number}.jpg": picture(number), f"{number}.{suffix}": (form % "ba"[number % 2]).encode()}
        source = open_source(str(tarred(tmp_path / "a.tar", files)))
        assert source.classes == ("a", "b") and source.labels == (1, 0, 1, 0)


def test_a_dot_in_a_name_does_not_end_it(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(4):
        files |= {f"v1.{number}.jpg": picture(number), f"v1.{number}.cls": b"%d" % (number % 2)}
    source = open_source(str(tarred(tmp_path / "a.tar", files)))
    assert source.labels == (0, 1, 0, 1) and source.warnings == ()


@pytest.mark.parametrize("beside", ["cls", "txt"])
@pytest.mark.parametrize("extra", ["seg.png", "depth.png"])
def test_of_a_keys_images_the_one_without_a_further_suffix_is_used(tmp_path: Path, extra: str, beside: str) -> None:
    files: dict[str, bytes] = {}
    for number in range(4):
        files |= {f"{number}.{extra}": b"mask", f"{number}.jpg": picture(number), f"{number}.{beside}": b"%d" % number}
    source = open_source(str(tarred(tmp_path / "a.tar", files)))
    assert source.names == ("0.jpg", "1.jpg", "2.jpg", "3.jpg") and source.read(2) == picture(2)
    assert any(text.startswith(f"4 images were left out, such as 0.{extra}") for text in source.warnings)
    assert source.labels == ((0, 1, 2, 3) if beside == "cls" else None)


def test_a_sample_without_a_usable_class_is_named(tmp_path: Path) -> None:
    files = {"0.jpg": picture(0), "0.cls": b"1", "1.jpg": picture(1), "2.jpg": picture(2), "2.cls": b"-1"}
    source = open_source(str(tarred(tmp_path / "a.tar", files)))
    assert source.labels is None and source.label_warnings[0].startswith("2 of 3 images have no class, such as 1.jpg")


def test_files_of_one_name_in_two_archives_are_two_images(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        files = {f"{image}.png": picture(number * 10 + image) for image in range(5)}
        tarred(tmp_path / split / "00000.tar", files)
        tarred(tmp_path / split / "._00000.tar", {"x.png": b"metadata"})
    source = open_source(str(tmp_path))
    assert source.splits == ("train",) * 5 + ("val",) * 5 and source.names[5] == "val/00000/0.png"
    assert [source.read(index) for index in (0, 5)] == [picture(0), picture(10)]
    assert "5 images of the test split were left out" in source.warnings[0]


def test_archives_of_one_name_in_a_range_of_folders_are_told_apart(tmp_path: Path) -> None:
    for number in range(2):
        tarred(tmp_path / f"{number}" / "a.tar", {"0.png": picture(number)})
    source = open_source(f"{tmp_path}/{{0..1}}/a.tar")
    assert source.names == ("0/a/0.png", "1/a/0.png")


@pytest.mark.parametrize("titles", [("train", "val"), ("set-train-0", "set-val-0"), ("a", "b")])
def test_class_folders_in_several_archives_give_classes(tmp_path: Path, titles: tuple[str, str]) -> None:
    for title in titles:
        tarred(tmp_path / f"{title}.tar", {"cat/1.png": picture(1), "dog/1.png": picture(2)})
    source = open_source(str(tmp_path))
    assert len(source) == 4 and set(classes_of(source).values()) == {"cat", "dog"} and source.label_warnings == ()
    assert (source.splits is None) == (titles == ("a", "b"))
