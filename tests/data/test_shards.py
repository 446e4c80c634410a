"""The prepared set: deterministic, readable by others, read at random by any process, loud when damaged."""

import io
import json
import multiprocessing
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from movq_cli.data import png
from movq_cli.data.images import encode_png
from movq_cli.data.shard_writer import Entry, Reject, content_hash, inspect_shard, write_shard
from movq_cli.data.shards import MANIFEST, PLAN, DatasetManifest, PreparedSet, Split, SplitName, member_name, shard_path
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.sources.open import open_source

rng = np.random.default_rng(0)
PIXELS = [rng.integers(0, 256, (8 + i % 3, 9, 3), dtype=np.uint8) for i in range(12)]


def entry(number, label):
    # What we write, and what sets of before hold, or another's tools put there.
    pixels = PIXELS[number % 12]
    data = encode_png(Image.fromarray(pixels)) if number % 3 == 2 else png.encode(pixels, ("none", "zlib")[number % 3])
    return Entry(member_name(number), data, label, f"src/{number}.jpg")


def make(root, *, labelled=True, val=3):
    """Ten training images in shards of at most five, of which number 2 was refused, and `val` others."""
    reports = {}
    plan: dict[tuple[SplitName, int], list[int]] = {
        ("train", 0): [0, 1, 2, 3, 4],
        ("train", 1): [1000, 1001, 1002, 1003, 1004],
    }
    if val:
        plan["val", 0] = list(range(val))
    for (split, shard), numbers in plan.items():
        images = [entry(n, n % 2 if labelled else None) for n in numbers]
        if (split, shard) == ("train", 0):
            images[2] = Reject("src/2.jpg", "truncated")
        write_shard(shard_path(root, split, shard), images)
        reports[f"{split}/{shard:05d}.zip"] = inspect_shard(shard_path(root, split, shard))
    DatasetManifest(
        source="src",
        size=None,
        square=False,
        filter="lanczos",
        upscale=False,
        background=(255, 255, 255),
        orientation=True,
        counts={"train": 9, "val": val},
        shards={"train": 2, "val": int(val > 0)},
        classes=("a", "b") if labelled else (),
        min_side=8,
        max_side=10,
        rejects=1,
        hash=content_hash(reports),
        digests={name: report.digest for name, report in reports.items()},
    ).write(root)
    return reports


def test_pixels_labels_names_and_files_come_back(tmp_path):
    make(tmp_path)
    train = PreparedSet.open(tmp_path).split("train")
    numbers = [0, 1, 3, 4, 1000, 1001, 1002, 1003, 1004]
    assert len(train) == 9 and train.classes == ("a", "b")
    assert train.labels is not None
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [n % 2 for n in numbers]
    for index in (8, 0, 3, 4, 5, 1, 7, 2, 6):
        n = numbers[index]
        assert train.name(index) == member_name(n) == f"{n // 1000:05d}/img{n:08d}.png"
        assert train.read(index) == entry(n, 0).data
        pixels = train.pixels(index)
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, PIXELS[n % 12])


def test_an_empty_val_split_and_a_set_without_labels(tmp_path):
    make(tmp_path, labelled=False, val=0)
    prepared = PreparedSet.open(tmp_path)
    assert len(prepared.split("val")) == 0 and prepared.split("val").labels is None
    assert prepared.split("train").labels is None and prepared.manifest.classes == ()


def test_nvidias_tools_find_what_they_expect(tmp_path):
    make(tmp_path)
    with zipfile.ZipFile(shard_path(tmp_path, "train", 0)) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        index = json.loads(archive.read("dataset.json"))
        images = [name for name in archive.namelist() if name.endswith(".png")]
        assert dict(index["labels"]) == {name: int(name[-5]) % 2 for name in images}
        assert index["sources"] == {name: f"src/{int(name[9:17])}.jpg" for name in images}
        assert index["rejects"] == [["src/2.jpg", "truncated"]]
        assert Image.open(io.BytesIO(archive.read(images[0]))).size == (9, 8)
    make(tmp_path / "bare", labelled=False)
    with zipfile.ZipFile(shard_path(tmp_path / "bare", "train", 0)) as archive:
        assert json.loads(archive.read("dataset.json"))["labels"] is None


def test_the_bytes_follow_from_the_images_alone(tmp_path, monkeypatch):
    first = make(tmp_path / "one")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setattr("time.time", lambda: 2e9)
    second = make(tmp_path / "two")
    assert first == second
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    assert content_hash(first) == content_hash(dict(reversed(first.items())))
    moved = {**first, "train/00000.zip": first["train/00001.zip"], "train/00001.zip": first["train/00000.zip"]}
    assert content_hash(moved) != content_hash(first)


def test_a_report_says_what_the_file_holds(tmp_path):
    report = make(tmp_path)["train/00000.zip"]
    assert (report.images, report.sides) == (4, (8, 9))
    assert report.rejects == (Reject("src/2.jpg", "truncated"),)
    write_shard(tmp_path / "none.zip", [Reject("a", "b")])
    none = inspect_shard(tmp_path / "none.zip")
    assert (none.images, none.sides, none.rejects) == (0, None, (Reject("a", "b"),))


def test_images_are_taken_one_at_a_time_and_a_failure_leaves_no_shard(tmp_path):
    def images():
        yield entry(0, 0)
        assert [path.name for path in tmp_path.iterdir()] == ["s.zip.partial"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "s.zip", images())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("break_it", ["missing", "unfinished", "no shard", "manifest", "version", "swapped"])
def test_what_cannot_be_opened_says_what_to_run(tmp_path, break_it):
    make(tmp_path)
    if break_it in {"missing", "unfinished"}:
        (tmp_path / MANIFEST).unlink()
    if break_it == "unfinished":
        (tmp_path / PLAN).write_text("{}")
    if break_it == "no shard":
        shard_path(tmp_path, "train", 1).unlink()
    if break_it == "manifest":
        (tmp_path / MANIFEST).write_text("{")
    if break_it == "version":
        text = (tmp_path / MANIFEST).read_text().replace('"format": 1', '"format": 2')
        (tmp_path / MANIFEST).write_text(text)
    if break_it == "swapped":
        shard_path(tmp_path, "val", 0).replace(shard_path(tmp_path, "train", 1))
        make(tmp_path / "other")
        shard_path(tmp_path / "other", "val", 0).replace(shard_path(tmp_path, "val", 0))
    with pytest.raises(BadRequestError, match="movq prepare") as caught:
        PreparedSet.open(tmp_path).split("train")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    if break_it == "unfinished":
        assert "unfinished" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -30])
def test_a_truncated_shard_is_a_bad_request(tmp_path, keep):
    make(tmp_path)
    path = shard_path(tmp_path, "train", 1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadRequestError, match=r"00001\.zip is damaged"):
        PreparedSet.open(tmp_path).split("train")
    with pytest.raises(BadRequestError, match=r"00001\.zip is damaged"):
        inspect_shard(path)


def test_rotten_pixels_are_a_failure_that_names_the_image(tmp_path):
    make(tmp_path)
    train = PreparedSet.open(tmp_path).split("train")
    path = shard_path(tmp_path, "train", 0)
    data = bytearray(path.read_bytes())
    data[data.index(b"IHDR") + 30 : data.index(b"IEND") - 4] = b"\0" * (data.index(b"IEND") - 34 - data.index(b"IHDR"))
    path.write_bytes(data)
    with pytest.raises(FailureError, match=r"00000/img00000000.png in .*00000\.zip is damaged"):
        train.pixels(0)
    assert np.array_equal(train.pixels(1), PIXELS[1])


def test_a_vanished_shard_is_a_failure(tmp_path):
    make(tmp_path)
    train = PreparedSet.open(tmp_path).split("train")
    shard_path(tmp_path, "train", 0).unlink()
    with pytest.raises(FailureError, match=r"cannot read .*00000\.zip: No such file"):
        train.read(0)


_kept: dict[str, Split] = {}


def _keep(split):
    _kept["split"] = split


def _right(i):
    number = [0, 1, 3, 4, 1000, 1001, 1002, 1003, 1004][i % 9]
    return np.array_equal(_kept["split"].pixels(i % 9), PIXELS[number % 12])


@pytest.mark.parametrize("pickled", [False, True])
def test_a_split_is_read_by_several_processes_at_once(tmp_path, pickled):
    make(tmp_path)
    split = PreparedSet.open(tmp_path).split("train")
    _keep(split)
    assert all(map(_right, range(9)))  # descriptors are open before the fork
    given = pickle.loads(pickle.dumps(split)) if pickled else split
    with multiprocessing.get_context("fork").Pool(2, initializer=_keep, initargs=(given,)) as pool:
        results = pool.map_async(_right, range(1800), chunksize=50)
        assert all(map(_right, range(1800)))
        assert all(results.get(20))


def test_a_prepared_set_is_a_source_with_its_splits(tmp_path):
    make(tmp_path)
    source = open_source(str(tmp_path))
    assert source.names[0] == "train/00000/img00000000.png" and source.names[-1] == "val/00000/img00000002.png"
    assert list(source.names) == sorted(source.names) and len(source) == 12
    assert source.splits == ("train",) * 9 + ("val",) * 3
    assert source.labels == (0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0) and source.classes == ("a", "b")
    assert source.native_size is None
    assert source.read(9) == entry(0, 0).data and source.read(8) == entry(1004, 0).data
    val = open_source(str(tmp_path), "val")
    assert len(val) == 3 and val.read(1) == entry(1, 0).data and val.labels == (0, 1, 0)
    assert pickle.loads(pickle.dumps(val)).read(2) == val.read(2)


def test_an_unfinished_set_is_no_source_but_a_manifest_alone_does_not_make_a_set(tmp_path):
    make(tmp_path / "set")
    (tmp_path / "set" / MANIFEST).unlink()
    with pytest.raises(BadRequestError, match="no prepared set"):
        open_source(str(tmp_path / "set"))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / MANIFEST).write_text('{"images": []}')
    (tmp_path / "samples" / "000000.png").write_bytes(entry(0, 0).data)
    assert open_source(str(tmp_path / "samples")).names == ("000000.png",)
