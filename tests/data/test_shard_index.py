"""The labels of a shard are believed only if they are those of its images, and its index only up to a size."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from movq_cli import digests
from movq_cli.data import shard_index
from movq_cli.data.shards import PreparedSet, Split, shard_path
from movq_cli.errors import BadRequestError


def opened(prepared: PreparedSet, index: Callable[[dict[str, Any]], object]) -> Split:
    """Open a shard of a prepared set after a change of its index, with a digest that fits."""
    path = shard_path(prepared.root, "train", 0)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members["dataset.json"] = json.dumps(index(json.loads(members["dataset.json"]))).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with path.open("r+b") as file:
        digests.append_to_zip(file)
    return Split.from_shards((path,), prepared.manifest.classes)


Change = Callable[[list[list[Any]]], list[list[Any]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels[::-1], "48 labels for 48 images of a set with 3 classes"),
        (lambda labels: labels[1:], "47 labels for 48 images"),
        (lambda labels: [*labels, labels[0]], "49 labels for 48 images"),
        (lambda labels: [[name, 3] for name, _ in labels], "has the label 3, but there are 3 classes"),
        (lambda labels: [[name, -1] for name, _ in labels], "has the label -1"),
        (lambda labels: [[name, 10**30] for name, _ in labels], "has the label 1000"),
        (lambda labels: [[name, True] for name, _ in labels], "has the label True"),
        (lambda labels: [[name, 1.0] for name, _ in labels], "has the label 1.0"),
        (lambda labels: [[name, label, 0] for name, label in labels], "is damaged"),
        (lambda _labels: [], "0 labels for 48 images"),
    ],
)
def test_labels_of_other_images_or_classes_are_refused(prepared: PreparedSet, change: Change, message: str) -> None:
    with pytest.raises(BadRequestError, match=r"shard \S+00000\.zip is damaged") as caught:
        opened(prepared, lambda index: {**index, "labels": change(index["labels"])})
    assert message in str(caught.value)


def test_an_unchanged_index_is_accepted(prepared: PreparedSet) -> None:
    split = opened(prepared, lambda index: index)
    assert split.labels is not None
    assert sorted(set(split.labels.tolist())) == [0, 1, 2]


def test_an_index_that_is_no_object_is_refused(prepared: PreparedSet) -> None:
    with pytest.raises(BadRequestError, match="no JSON object"):
        opened(prepared, lambda _index: [])


def test_an_index_that_is_too_large_or_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    for name, data, message in (
        ("large.zip", b"x" * (shard_index._MAX_BYTES + 1), "has 67108865 bytes"),
        ("deep.zip", b"[" * 10**6, "nested too deeply"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("dataset.json", data)
        with pytest.raises(BadRequestError, match=message):
            Split.from_shards((tmp_path / name,), ())
