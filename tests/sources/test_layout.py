"""Folders give splits and classes; folders that are no classes give none, and every image that is left out is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source
from tests.sources.files import fill, picture


def classes_of(source: Source) -> dict[str, str | None]:
    """Return the name of the class of each image."""
    labels: tuple[int | None, ...] = source.labels or (None,) * len(source)
    return {
        name: None if label is None else source.classes[label] for name, label in zip(source.names, labels, strict=True)
    }


def splits_of(source: Source) -> dict[str, str]:
    assert source.splits is not None
    return dict(zip(source.names, source.splits, strict=True))


@pytest.mark.parametrize("test", ["test", "Testing"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_a_test_split_is_never_validation_data(tmp_path: Path, val: str, test: str) -> None:
    source = open_source(str(fill(tmp_path, "train/1.png", f"{val}/2.png", f"{test}/3.png", f"{test}/4.png")))
    assert splits_of(source) == {"train/1.png": "train", f"{val}/2.png": "val"}
    (warning,) = source.warnings
    assert warning.startswith(f"2 images of the test split were left out, such as {test}/3.png")


def test_beside_a_test_split_alone_the_validation_images_are_drawn_from_the_training_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "in", *(f"train/{number}.png" for number in range(6)), "test/7.png")
    prepare(PrepareRequest(str(tmp_path / "in"), tmp_path / "out", val="2"), Console())
    assert PreparedSet.open(tmp_path / "out").manifest.counts == {"train": 4, "val": 2}
    assert "1 images of the test split were left out" in capsys.readouterr().err
    with pytest.raises(BadRequestError, match="no val split"):
        open_source(str(tmp_path / "in"), "val")


def test_what_is_in_no_split_is_left_out_and_said(tmp_path: Path) -> None:
    source = open_source(str(fill(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "extra/4.png", "5.png")))
    assert classes_of(source) == {"train/a/1.png": "a", "train/b/2.png": "b", "val/a/3.png": "a"}
    assert source.warnings == (
        "2 images were left out, because they are in no train, val or test folder, such as 5.png",
    )


def test_a_vehicle_is_a_class_beside_other_vehicles(tmp_path: Path) -> None:
    source = open_source(str(fill(tmp_path, "train/1.png", "bus/2.png", "tram/3.png")))
    assert source.splits is None and source.classes == ("bus", "train", "tram")


def test_a_folder_of_the_val_split_without_training_images_is_no_class(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/c/4.png", "val/c/5.png")
    source = open_source(str(tmp_path))
    assert classes_of(source) == {"train/a/1.png": "a", "train/b/2.png": "b", "val/a/3.png": "a"}
    assert source.warnings[0].startswith("2 images of the val split were left out") and "val/c/4.png" in str(source)


@pytest.mark.parametrize("level", ["images", "Images", "img"])
def test_a_level_called_images_is_no_class(tmp_path: Path, level: str) -> None:
    below = fill(tmp_path / "below", f"train/a/{level}/1.png", f"train/b/{level}/2.png", f"val/b/{level}/3.png")
    assert set(classes_of(open_source(str(below))).values()) == {"a", "b"}
    above = fill(tmp_path / "above", f"train/{level}/a/1.png", f"train/{level}/b/2.png", f"val/{level}/b/3.png")
    assert set(classes_of(open_source(str(above))).values()) == {"a", "b"}
    flat = fill(tmp_path / "flat", f"train/a/{level}/1.png", f"train/b/{level}/2.png", f"val/{level}/3.png")
    source = open_source(str(flat))
    assert source.classes == () and "--val-labels" in source.label_warnings[0]
    yolo = open_source(str(fill(tmp_path / "yolo", f"{level}/train/1.png", f"{level}/val/2.png")))
    assert yolo.splits == ("train", "val") and yolo.classes == () and yolo.label_warnings == ()


def test_folders_that_store_parts_of_a_numbered_sequence_are_no_classes(tmp_path: Path) -> None:
    ffhq = fill(tmp_path / "ffhq", *(f"{number // 1000 * 1000:05d}/{number:05d}.png" for number in (0, 9, 1000, 69999)))
    source = open_source(str(ffhq))
    assert source.classes == () and len(source) == 4
    assert source.label_warnings[0].startswith("the folders 00000 to 69000 store parts of one numbered sequence")


@pytest.mark.parametrize(
    "names",
    [
        ("00000/1.png", "00000/2.png", "00001/1.png"),  # numbers of each class begin at the same number
        ("00000/00000_01.png", "00001/00001_01.png"),  # the German traffic signs
        ("0/1.png", "1/2.png"),
        ("00000/1.png", "00001/2.png", "00000/3.png"),
        ("00000/1.png", "cat/2.png"),
    ],
)
def test_classes_with_numbers_as_names_stay_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = open_source(str(fill(tmp_path, *names)))
    assert source.classes == tuple(sorted({name.split("/")[0] for name in names}))


@pytest.mark.parametrize(
    ("folder", "stray"),
    [("", "a.png"), ("top/", "a.png"), ("top/", "top/a.png"), ("images/", "a.png"), ("top/images/", "top/a.png")],
)
def test_one_image_without_a_class_is_named_with_the_choice(tmp_path: Path, folder: str, stray: str) -> None:
    cats = [f"{folder}{name}/{number}.png" for name in ("cat", "dog") for number in range(3)]
    source = open_source(str(fill(tmp_path, *cats, stray)))
    assert source.classes == () and len(source) == 7
    (warning,) = source.label_warnings
    assert warning.startswith(f"1 of 7 images have no class, such as {stray}, so that no image has one")
    assert "--no-labels" in warning


def test_the_command_shows_the_warning_unless_no_labels_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "in", "cat/1.png", "dog/2.png", "stray.png", "notes.txt")
    prepare(PrepareRequest(str(tmp_path / "in"), tmp_path / "a", val="1"), Console())
    warned = capsys.readouterr().err
    assert "warning: 1 of 3 images have no class, such as stray.png" in warned and "1 .txt" in warned
    prepare(PrepareRequest(str(tmp_path / "in"), tmp_path / "b", val="1", keep_labels=False), Console())
    warned = capsys.readouterr().err
    assert "have no class" not in warned and "1 .txt" in warned


def test_an_image_of_a_list_without_a_class_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "list.txt").write_text("a.png\tx\nb.png\nc.png\ty\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert source.classes == () and "1 of 3 images have no class, such as b.png" in source.label_warnings[0]


def test_folders_of_the_system_are_left_out_and_named(tmp_path: Path) -> None:
    system = ["@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "__MACOSX", "System Volume Information"]
    fill(tmp_path, "cat/1.png", "dog/2.png", *(f"{name}/cat/3.png" for name in system), "cat/@eaDir/1.png/T.jpg")
    source = open_source(str(tmp_path))
    assert source.names == ("cat/1.png", "dog/2.png") and source.classes == ("cat", "dog")
    (warning,) = source.warnings
    assert all(name in warning for name in system)


def test_files_that_are_no_readable_images_are_counted_by_suffix(tmp_path: Path) -> None:
    fill(tmp_path, "1.png", "2.psd", "3.psd", "4.MOV", "README", ".hidden")
    assert open_source(str(tmp_path)).warnings == (
        "4 files that are no readable images were left out: 2 .psd, 1 .mov, 1 without suffix",
    )
    (tmp_path / "1.png").unlink()
    with pytest.raises(BadRequestError, match=r"no image in .*: it holds 2 \.psd, 1 \.mov"):
        open_source(str(tmp_path))
    (tmp_path / "1.png").write_bytes(picture(0))
    (tmp_path / "shard.tar").write_bytes(b"")
    assert "1 .tar" in open_source(str(tmp_path)).warnings[0]
