"""The contract of a source: what violates it cannot be constructed, and every kind keeps it."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from movq_cli.data.images import BadImageError, encode_png
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source


class Numbers:
    """A reader whose files are the member numbers."""

    def read(self, member: int) -> bytes:
        return str(member).encode()


def source(*names: str) -> Source:
    return Source("here", names, tuple(range(len(names))), Numbers())


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/../b", "./a", "a/./b", "//", "\n/"]
)
def test_a_name_that_leaves_its_folder_or_is_ambiguous_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a plain relative path"):
        source(name)
    with pytest.raises(ValueError, match="not a plain relative path"):
        source(*sorted([name, "~"]))


@pytest.mark.parametrize("name", ["...", "a.b/..c", ".a", "a/.b", "a\nb", " ", "数/é", "\udcff", "a\\..\\b", "C:"])
def test_odd_but_safe_names_are_accepted(name: str) -> None:
    assert source(name).names == (name,)


@given(st.lists(st.sampled_from(["a", "b", "b/c", "c", "C", "é"]), min_size=2, max_size=4))
def test_names_must_be_sorted_and_unique(names: list[str]) -> None:
    if names == sorted(set(names)):
        assert len(source(*names)) == len(names)
    else:
        with pytest.raises(ValueError, match="not sorted and unique"):
            source(*names)


def test_labels_classes_splits_and_members_must_fit() -> None:
    good = replace(source("a", "b"), labels=(0, 1), classes=("x", "y"), splits=("train", "val"))
    assert good.take([1]).labels == (1,) and good.only_split("val").names == ("b",)
    for change, violation in [
        ({"labels": (0,)}, "1 labels for 2 names"),
        ({"members": (0, 1, 2)}, "3 members for 2 names"),
        ({"splits": ()}, "0 splits for 2 names"),
        ({"labels": None}, "2 classes and no labels"),
        ({"classes": ()}, "0 classes and some labels"),
        ({"labels": (0, 2)}, "labels outside 0 to 1"),
        ({"labels": (-1, 0)}, "labels outside 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=violation):
            replace(good, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not sorted"):
        good.take([1, 0])


def test_a_split_that_is_empty_or_unknown_is_a_bad_request_and_no_splits_mean_all_images() -> None:
    plain = source("a", "b")
    assert plain.of_split("val") is plain
    with pytest.raises(BadRequestError, match="has no val split"):
        plain.only_split("val")
    with pytest.raises(BadRequestError, match="has no val split"):
        replace(plain, splits=("train", "train")).of_split("val")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("wrong"), RuntimeError("encrypted")])
def test_what_a_reader_raises_is_a_bad_image(error: Exception) -> None:
    class Broken:
        def read(self, member: int) -> bytes:
            raise error

    with pytest.raises(BadImageError, match="cannot be read: "):
        Source("here", ("a",), (0,), Broken()).read(0)


NAMES = [f"{split}/{label}/{number:02d}.png" for split in ("train", "val") for label in "ab" for number in range(5)]


def _png(number: int) -> bytes:
    return encode_png(Image.new("RGB", (4, 4), (number, 0, 0)))


def _make(kind: str, folder: Path) -> str:
    """Write `NAMES` as a source of this kind, in an order that is not that of the names."""
    files = {name: _png(number) for number, name in enumerate(NAMES)}
    shuffled = [NAMES[index] for index in np.random.default_rng(0).permutation(len(NAMES))]
    path = folder / {"zip": "a.zip", "tar": "a.tar", "tar.gz": "a.tar.gz", "npz": "a.npz"}.get(kind, "files")
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in shuffled:
                archive.writestr(name, files[name])
    elif kind.startswith("tar"):
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
            for name in shuffled:
                info = tarfile.TarInfo(name)
                info.size = len(files[name])
                tar.addfile(info, io.BytesIO(files[name]))
    elif kind == "npz":
        np.savez(path, np.stack([np.full((4, 4, 3), number, np.uint8) for number in range(20)]))
    else:
        for name in shuffled:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(files[name])
        if kind == "list":
            path = folder / "list.txt"
            path.write_text("\n".join(f"files/{name}" for name in shuffled))
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "list", "zip", "tar", "tar.gz", "npz", "prepared"])
def test_every_kind_is_sorted_and_read_by_many_threads_at_once(
    kind: str, tmp_path: Path, prepared: PreparedSet
) -> None:
    location = str(prepared.root) if kind == "prepared" else _make(kind, tmp_path)
    found = open_source(location)
    assert list(found.names) == sorted(set(found.names))
    assert found.location == location
    expected = [found.read(index) for index in range(len(found))]
    if kind not in ("npz", "prepared"):
        assert expected == [_png(number) for number in range(len(NAMES))]
    for same in (found, pickle.loads(pickle.dumps(found))):
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(same.read, [index % len(found) for index in range(1000)]))
        assert read == [expected[index % len(found)] for index in range(1000)]


def test_an_array_of_more_than_a_million_images_keeps_its_order(tmp_path: Path) -> None:
    images = np.zeros((1_000_002, 1, 1, 3), np.uint8)
    images[-1] = 9
    np.savez(tmp_path / "a.npz", images)
    found = open_source(str(tmp_path / "a.npz"))
    assert (found.names[0], found.names[-1]) == ("0000000.png", "1000001.png")
    assert found.read(1_000_001) == encode_png(Image.new("RGB", (1, 1), (9, 9, 9)), compress_level=0)
