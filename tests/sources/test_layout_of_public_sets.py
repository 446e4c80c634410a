"""Layouts of folders and of label files in which public data sets and other programs store images."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from movq_cli.sources.open import open_source
from movq_cli.sources.splits import split_images
from tests.sources.files import fill


def test_years_after_the_names_of_splits_are_no_classes(tmp_path: Path) -> None:
    names = [f"images/{part}2017/{number}.png" for part in ("train", "val", "test") for number in range(2)]
    source = open_source(str(fill(tmp_path / "coco", *names)))
    assert source.splits == ("train", "train", "val", "val") and source.classes == ()
    assert "2 images of the test split were left out" in source.warnings[0]


def test_dev_is_validation_and_eval_is_test(tmp_path: Path) -> None:
    names = [f"{part}/{kind}/0.png" for part in ("train", "dev", "eval") for kind in ("cat", "dog")]
    source = open_source(str(fill(tmp_path / "set", *names)))
    assert source.names == ("dev/cat/0.png", "dev/dog/0.png", "train/cat/0.png", "train/dog/0.png")
    assert source.splits == ("val", "val", "train", "train") and source.classes == ("cat", "dog")


def test_another_folder_beside_train_and_test_is_left_out_and_said(tmp_path: Path) -> None:
    source = open_source(str(fill(tmp_path / "svhn", "train/0.png", "train/1.png", "test/0.png", "extra/0.png")))
    assert source.names == ("train/0.png", "train/1.png") and source.labels is None
    assert "extra/0.png" in source.warnings[1]


def test_numbered_folders_without_two_parts_stay_classes(tmp_path: Path) -> None:
    source = open_source(str(fill(tmp_path / "toys", "train1/0.png", "train2/0.png", "bus/0.png")))
    assert source.classes == ("bus", "train1", "train2") and source.splits is None


@pytest.mark.parametrize("labels", [[1.0, 0.0], [[0, 1], [1, 0]], [[0.0, 1.0], [1.0, 0.0]]])
def test_labels_as_floats_or_one_hot_vectors_are_classes(tmp_path: Path, labels: list[object]) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.png", labels[0]], ["b.png", labels[1]]]}))
    assert open_source(str(tmp_path)).labels == (1, 0)


@pytest.mark.parametrize("is_decomposed", [True, False])
def test_both_unicode_forms_of_a_name_are_one_image(tmp_path: Path, is_decomposed: bool) -> None:
    composed = [unicodedata.normalize("NFC", f"é{number}.png") for number in range(3)]
    decomposed = [unicodedata.normalize("NFD", name) for name in composed]
    stored, listed = (decomposed, composed) if is_decomposed else (composed, decomposed)
    fill(tmp_path / "imgs", *stored)
    labels = [[name, number] for number, name in enumerate(listed)]
    (tmp_path / "imgs" / "dataset.json").write_text(json.dumps({"labels": labels}))
    (tmp_path / "val.txt").write_text(listed[1])
    source = open_source(str(tmp_path / "imgs"))
    assert source.labels == (0, 1, 2) and source.label_warnings == ()
    assert split_images(source, "0.1", tmp_path / "val.txt", lambda _: True)["val"] == [1]
