"""Images are found in parquet files as the `datasets` library writes them, in any order and with a bounded memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from movq_cli.data.images import BadImageError
from movq_cli.errors import BadRequestError
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source
from tests.sources.files import fill, picture

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'movq[parquet]'")
pq = pytest.importorskip("pyarrow.parquet")

CLASSES = ["tench, Tinca tinca", "goldfish, Carassius auratus"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def described(classes: Sequence[str] = CLASSES, column: str = "label") -> dict[bytes, bytes]:
    """Return the metadata that the `datasets` library writes."""
    label = {"names": list(classes), "_type": "ClassLabel"}
    features = {"image": {"mode": "RGB", "_type": "Image"}, column: label}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def shard(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[object] | None = None,
    *,
    names: Sequence[str | None] | None = None,
    metadata: dict[bytes, bytes] | None = None,
    rows: int = 3,
    **options: Any,
) -> Path:
    """Write a file with some images, `rows` of them in each row group."""
    names = names or [f"n{number}.JPEG" for number in range(len(images))]
    cells = [{"bytes": data, "path": name} for data, name in zip(images, names, strict=True)]
    columns: dict[str, Any] = {"image": pa.array(cells, IMAGE)}
    if labels is not None:
        columns["label"] = pa.array(labels)
    table = pa.table(columns).replace_schema_metadata(described() if metadata is None else metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows, **options)
    return path


def pictures(count: int, first: int = 0) -> list[bytes]:
    return [picture(first + number) for number in range(count)]


def imagenet(folder: Path) -> Path:
    """Write three splits as ImageNet has them on the hub."""
    shard(folder / "data" / "train-00000-of-00002-0f1a.parquet", pictures(7), [0, 1, 0, 1, 0, 1, 0])
    shard(folder / "data" / "train-00001-of-00002-ab3c.parquet", pictures(4, 7), [1, 1, 0, 0])
    shard(folder / "data" / "validation-00000-of-00001-77ee.parquet", pictures(3, 11), [0, 1, 1])
    shard(folder / "data" / "test-00000-of-00001-1234.parquet", pictures(2, 14), [-1, -1])
    return folder


def test_imagenet_as_the_hub_has_it_gives_splits_classes_and_former_names(tmp_path: Path) -> None:
    source = open_source(str(imagenet(tmp_path / "in")))
    assert source.splits == ("train",) * 11 + ("val",) * 3
    assert source.classes == tuple(CLASSES)
    assert source.labels == (0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1)
    assert source.names[0] == "data/train-00000-of-00002-0f1a/000000-n0.JPEG"
    assert source.names[11] == "data/validation-00000-of-00001-77ee/000000-n0.JPEG"
    assert [source.read(index) for index in range(14)] == pictures(14)
    assert not source.label_warnings
    (warning,) = source.warnings
    assert "2 images of the test split were left out" in warning


def test_a_single_file_is_a_source_without_splits(tmp_path: Path) -> None:
    source = open_source(str(imagenet(tmp_path) / "data" / "test-00000-of-00001-1234.parquet"))
    assert (len(source), source.splits, source.labels) == (2, None, None)
    assert source.read(1) == picture(15)


def test_images_are_read_in_any_order_from_threads_copies_and_forked_processes(tmp_path: Path) -> None:
    source = open_source(str(shard(tmp_path / "a.parquet", pictures(20), rows=4)))
    order = [19, 0, 7, 6, 5, 12, 13, 1, 18, 3] * 3
    expected = [picture(index) for index in order]
    assert [source.read(index) for index in order] == expected
    assert [pickle.loads(pickle.dumps(source)).read(index) for index in order[:3]] == expected[:3]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == expected
    with multiprocessing.get_context("fork").Pool(2) as processes:
        assert processes.map(source.read, order) == expected


def test_a_row_group_larger_than_the_memory_is_read_image_by_image(tmp_path: Path) -> None:
    images = [bytes(2**19) + os.urandom(2**19) for _ in range(48)]
    # Else pyarrow looks at the size of a page after 1,024 rows only.
    path = shard(tmp_path / "a.parquet", images, rows=48, write_batch_size=1, use_dictionary=False)
    source, before, peak = open_source(str(path)), pa.total_allocated_bytes(), 0
    for index, image in enumerate(images):
        assert source.read(index) == image
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < 8 * 2**20  # of 48 MiB


def test_a_damaged_page_costs_only_the_images_of_its_row_group(tmp_path: Path) -> None:
    images = [os.urandom(3000) for _ in range(12)]
    path = shard(tmp_path / "a.parquet", images, rows=4)
    data = path.read_bytes()
    at = data.index(images[5])
    path.write_bytes(data[: at - 4] + b"\xff" * 8 + data[at + 4 :])
    source = open_source(str(path))
    for index, image in enumerate(images):
        if index // 4 == 1:
            with pytest.raises(BadImageError, match=r"^cannot be read: [^\n]+$"):
                source.read(index)
        else:
            assert source.read(index) == image


def test_a_row_without_an_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    source = open_source(str(shard(tmp_path / "a.parquet", [picture(0), None, picture(2)])))
    with pytest.raises(BadImageError, match="the row has no bytes of an image"):
        source.read(1)
    assert source.read(2) == picture(2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read the parquet file .*a.parquet: .*size is 0 bytes"),
        (b"not parquet at all, but long enough to be one", "cannot read the parquet file .*a.parquet: .*magic bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a.parquet is a pointer of Git LFS"),
    ],
)
def test_a_foreign_file_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    for location in (tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(BadRequestError, match=message) as caught:
            open_source(str(location))
        assert "\n" not in str(caught.value)


def test_no_damage_of_a_file_is_anything_but_one_clear_line(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.parquet", pictures(6), [0, 1] * 3)
    data = path.read_bytes()
    damages = [data[:length] for length in range(0, len(data), len(data) // 20)]
    damages += [data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :] for at in range(0, len(data), len(data) // 60)]
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            source = open_source(str(path))
        except BadRequestError as error:
            assert "\n" not in str(error)
            continue
        for index in range(len(source)):
            try:
                source.read(index)
            except BadImageError as error:
                assert "\n" not in str(error)


def test_a_file_without_images_is_refused_with_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(BadRequestError, match=r"no column of images, .* but text \(string\), n \(int64\)"):
        open_source(str(tmp_path))


def test_a_file_without_rows_holds_no_image(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"no image in .*: its parquet files have no rows"):
        open_source(str(shard(tmp_path / "a.parquet", [])))


def test_a_file_whose_name_says_no_split_beside_others_is_refused_and_moving_it_helps(tmp_path: Path) -> None:
    folder = imagenet(tmp_path / "in")
    extra = shard(folder / "extra.parquet", pictures(1), [0])
    with pytest.raises(BadRequestError, match=r"the name of extra\.parquet says no split.*move it out of the folder"):
        open_source(str(folder))
    extra.rename(tmp_path / "extra.parquet")
    assert len(open_source(str(folder))) == 14


def test_the_name_of_a_file_gives_its_split_before_those_of_its_folders(tmp_path: Path) -> None:
    shard(tmp_path / "train_set" / "validation" / "0.parquet", pictures(1))
    shard(tmp_path / "train_set" / "train" / "0.parquet", pictures(2))
    shard(tmp_path / "train_set" / "train" / "test-0.parquet", pictures(3))
    assert open_source(str(tmp_path)).splits == ("train", "train", "val")


def classes_of(tmp_path: Path, *files: dict[str, Any]) -> Source:
    for number, file in enumerate(files):
        labels = file.pop("labels")
        shard(tmp_path / f"{number}.parquet", pictures(len(labels)), labels, **file)
    return open_source(str(tmp_path))


def test_labels_without_metadata_are_numbers_or_names_of_classes(tmp_path: Path) -> None:
    numbers = classes_of(tmp_path / "a", {"labels": [2, 0], "metadata": {}}, {"labels": [1], "metadata": {}})
    assert (numbers.labels, numbers.classes) == ((2, 0, 1), ("0", "1", "2"))
    texts = classes_of(tmp_path / "b", {"labels": ["dog", "cat"], "metadata": {b"huggingface": b"{no json"}})
    assert (texts.labels, texts.classes) == ((1, 0), ("cat", "dog"))


def test_the_only_column_of_classes_is_used_whatever_its_name(tmp_path: Path) -> None:
    cells = pa.array([{"bytes": picture(0), "path": None}, {"bytes": picture(1), "path": None}], IMAGE)
    table = pa.table({"img": cells, "kind": pa.array([1, 0])}).replace_schema_metadata(described(column="kind"))
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(str(tmp_path))
    assert (source.labels, source.classes) == ((1, 0), tuple(CLASSES))
    assert source.names == ("a/000000", "a/000001")


def test_equal_names_of_classes_stay_apart(tmp_path: Path) -> None:
    source = classes_of(tmp_path, {"labels": [0, 1, 2], "metadata": described(["crane", "ox", "crane"])})
    assert source.classes == ("crane (0)", "ox", "crane (2)")


@pytest.mark.parametrize(
    ("files", "warning"),
    [
        ([{"labels": [0, None]}], "1 of 2 images have no class, such as 0/000001-n1.JPEG"),
        ([{"labels": [0, -1]}], "1 of 2 images have no class"),
        ([{"labels": [0, 2]}], "0/000001-n1.JPEG has the label 2, which is none of the 2 classes in the metadata"),
        ([{"labels": [0, -7]}], "has the label -7, which is none of the 2 classes"),
        ([{"labels": [0, 1]}, {"labels": [1], "metadata": described(["x", "y"])}], "1.parquet and 0.parquet name diff"),
        ([{"labels": [0.5, 1.0]}], "the column label of 0.parquet holds double and no classes"),
    ],
)
def test_labels_that_cannot_be_used_cost_a_warning_and_not_the_images(
    tmp_path: Path, files: list[dict[str, Any]], warning: str
) -> None:
    source = classes_of(tmp_path, *({**file} for file in files))
    assert source.labels is None
    assert warning in " ".join(source.label_warnings)


def test_foreign_names_stay_inside_a_folder_and_short(tmp_path: Path) -> None:
    names = ["../../etc/passwd", "C:\\a\\b.png", "..", "x" * 300 + ".png", None, "é" * 200]
    source = open_source(str(shard(tmp_path / "a.parquet", pictures(6), names=names)))
    assert source.names[:3] == ("a/000000-passwd", "a/000001-b.png", "a/000002-..")
    assert source.names[4] == "a/000004"
    assert all(len(os.fsencode(name.split("/")[1])) < 240 for name in source.names)


def test_images_beside_parquet_files_are_the_source(tmp_path: Path) -> None:
    shard(fill(tmp_path, "b.png") / "a.parquet", pictures(1))
    source = open_source(str(tmp_path))
    assert source.names == ("b.png",)
    assert "1 .parquet" in " ".join(source.warnings)


def test_without_pyarrow_the_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "a.parquet", pictures(1))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadRequestError, match=r"read with pyarrow.*pip install 'movq\[parquet\]'"):
        open_source(str(path))


def test_a_set_is_prepared_from_parquet_files_by_several_processes(tmp_path: Path) -> None:
    from movq_cli.commands.prepare import PrepareRequest, prepare
    from movq_cli.console import Console
    from movq_cli.data.shards import PreparedSet

    request = PrepareRequest(str(imagenet(tmp_path / "in")), tmp_path / "out", workers=2)
    prepare(request, Console(quiet=True))
    made = PreparedSet.open(tmp_path / "out")
    assert (len(made.split("train")), len(made.split("val"))) == (11, 3)
    assert made.manifest.classes == tuple(CLASSES)
    labels = made.split("val").labels
    assert labels is not None and labels.tolist() == [0, 1, 1]
