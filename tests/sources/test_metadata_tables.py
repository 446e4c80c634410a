"""The `metadata` tables of Hugging Face's imagefolder layout give classes, or a sentence says why they do not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source
from tests.sources.files import picture, tarred, written, zipped
from tests.sources.test_layout import classes_of

Write = Callable[[Path, Mapping[str, bytes]], Path]
WRITERS: list[Write] = [written, zipped, tarred]
NAMES = [f"{number}.png" for number in range(6)]
IMAGES = {name: picture(value) for value, name in enumerate(NAMES)}

Rows = Sequence[Mapping[str, object]]


def as_csv(rows: Rows) -> bytes:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    return "".join(f"{line}\n" for line in lines).encode()


def as_jsonl(rows: Rows) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def as_parquet(rows: Rows) -> bytes:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'movq[parquet]'")
    pq = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), buffer)
    return buffer.getvalue()


FORMS: list[tuple[str, Callable[[Rows], bytes]]] = [
    ("metadata.csv", as_csv),
    ("metadata.jsonl", as_jsonl),
    ("metadata.parquet", as_parquet),
]
every_form = pytest.mark.parametrize(("table", "encode"), FORMS, ids=[name for name, _ in FORMS])


def rows_of(labels: Sequence[object], names: Sequence[str] = NAMES) -> Rows:
    return [{"file_name": name, "label": label} for name, label in zip(names, labels, strict=True)]


def opened(folder: Path, files: Mapping[str, bytes]) -> Source:
    return open_source(str(written(folder / "in", files)))


def letters_of(source: Source) -> str:
    """Return the classes of the images, letters, in the order of their names."""
    return "".join(map(str, classes_of(source).values()))


@every_form
@pytest.mark.parametrize("write", WRITERS)
def test_names_and_numbers_are_classes_in_folders_and_archives(
    tmp_path: Path, write: Write, table: str, encode: Callable[[Rows], bytes]
) -> None:
    # Whole numbers are the numbers of classes, of which one may have no image; names are sorted.
    for labels, classes in (([0, 2, 2, 0, 2, 0], ("0", "1", "2")), (["b", "a", "a", "b", "a", "b"], ("a", "b"))):
        files = {**IMAGES, table: encode(rows_of(labels))}
        source = open_source(str(write(tmp_path / classes[0], files)))
        assert source.classes == classes and source.labels is not None
        assert [source.classes[label] for label in source.labels] == list(map(str, labels))
        assert source.warnings == source.label_warnings == ()


@every_form
@pytest.mark.parametrize("write", WRITERS)
def test_each_split_has_its_table_and_paths_are_relative_to_it(
    tmp_path: Path, write: Write, table: str, encode: Callable[[Rows], bytes]
) -> None:
    files: dict[str, bytes] = {}
    for split, labels in (("train", ["cat", "dog", "cat"]), ("validation", ["dog", "cat", "dog"])):
        paths = [f"images/{number}.png" for number in range(3)]
        files |= {f"{split}/{path}": picture(number) for number, path in enumerate(paths)}
        files[f"{split}/{table}"] = encode(rows_of(labels, paths))
    source = open_source(str(write(tmp_path / "x", files)))
    assert source.splits == ("train",) * 3 + ("val",) * 3
    assert list(classes_of(source).values()) == ["cat", "dog", "cat", "dog", "cat", "dog"]
    assert source.warnings == source.label_warnings == ()


@pytest.mark.parametrize(("write", "suffix"), [(zipped, "zip"), (tarred, "tar")])
def test_each_of_several_archives_has_its_table(tmp_path: Path, write: Write, suffix: str) -> None:
    for split, labels in (("train", "abcabc"), ("val", "cbacba")):
        (tmp_path / split).mkdir()
        write(tmp_path / split / f"0.{suffix}", {**IMAGES, "metadata.jsonl": as_jsonl(rows_of(labels))})
    source = open_source(str(tmp_path))
    assert source.splits == ("train",) * 6 + ("val",) * 6
    assert letters_of(source) == "abcabccbacba" and source.label_warnings == ()


def test_one_table_above_the_splits_gives_the_classes_of_both(tmp_path: Path) -> None:
    names = ["train/./a/0.png", "train\\b\\1.png", "val/a/2.png"]
    files = {name.replace("\\", "/").replace("./", ""): picture(value) for value, name in enumerate(names)}
    source = opened(tmp_path, {**files, "metadata.jsonl": as_jsonl(rows_of(["x", "y", "y"], names))})
    assert source.splits == ("train", "train", "val") and list(classes_of(source).values()) == ["x", "y", "y"]


def test_a_table_counts_more_than_class_folders_and_no_image_is_left_out_for_its_folder(tmp_path: Path) -> None:
    names = [f"{split}/{folder}/0.png" for split, folders in (("train", "abc"), ("val", "acd")) for folder in folders]
    images = {name: picture(value) for value, name in enumerate(names)}
    assert len(opened(tmp_path / "folders", images)) == 5  # The folder val/d is no class of the train split.
    source = opened(tmp_path / "table", {**images, "metadata.csv": as_csv(rows_of("xyxyxy", names))})
    assert letters_of(source) == "xyxyxy" and source.warnings == source.label_warnings == ()


def test_the_test_split_needs_no_labels(tmp_path: Path) -> None:
    names = [f"{split}/{number}.png" for split in ("train", "val", "test") for number in range(3)]
    rows = rows_of(["a", "b", "a", "b", "a", "b", -1, -1, None], names)
    source = opened(tmp_path, {**{name: picture(1) for name in names}, "metadata.jsonl": as_jsonl(rows)})
    assert len(source) == 6 and letters_of(source) == "ababab" and source.label_warnings == ()


def test_a_table_of_commas_in_quotes_with_a_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    table = '\ufefffile_name,text,label\r\n"1, a.png","two\r\nlines, ""quoted""",3\r\n2.png,,0\r\n'
    source = opened(tmp_path, {"1, a.png": picture(1), "2.png": picture(2), "metadata.csv": table.encode()})
    assert source.labels == (3, 0) and source.label_warnings == ()


def test_numbers_are_the_same_classes_in_every_form(tmp_path: Path) -> None:
    numbers = as_csv(rows_of(["1.0", "0", "+1", "0.0", "1", "1"]))
    assert opened(tmp_path / "csv", {**IMAGES, "metadata.csv": numbers}).labels == (1, 0, 1, 0, 1, 1)
    booleans = as_jsonl(rows_of([True, False, 1.0, 0.0, 1, 1]))
    assert opened(tmp_path / "jsonl", {**IMAGES, "metadata.jsonl": booleans}).labels == (1, 0, 1, 0, 1, 1)
    digits = as_jsonl(rows_of(["1", "0", "1", "0", "1", "1"]))
    assert opened(tmp_path / "names", {**IMAGES, "metadata.jsonl": digits}).classes == ("0", "1")


def test_one_column_of_file_names_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    rows = [{"image_file_name": row["file_name"], "label": row["label"]} for row in rows_of("ababab")]
    assert opened(tmp_path / "one", {**IMAGES, "metadata.csv": as_csv(rows)}).classes == ("a", "b")
    several = [{**row, "mask_file_name": "0.png"} for row in rows]
    source = opened(tmp_path / "several", {**IMAGES, "metadata.csv": as_csv(several)})
    assert source.labels is None and "has no column file_name" in source.label_warnings[0]


@every_form
def test_captions_are_no_classes_and_the_way_out_that_is_named_works(
    tmp_path: Path, table: str, encode: Callable[[Rows], bytes]
) -> None:
    rows = [{"file_name": name, "text": "cat" if name < "3" else "dog"} for name in NAMES]
    source = opened(tmp_path, {**IMAGES, table: encode(rows)})
    assert source.labels is None and source.classes == ()
    assert source.label_warnings == (
        f"{table} has no column label (file_name, text), so that it gives no classes. If a column has the classes, "
        "rename it label",
    )
    assert f"1 {Path(table).suffix}" in source.warnings[0]
    renamed = [{"file_name": row["file_name"], "label": row["text"]} for row in rows]
    assert opened(tmp_path, {table: encode(renamed)}).classes == ("cat", "dog")


def test_captions_leave_class_folders_as_they_are(tmp_path: Path) -> None:
    rows = [{"file_name": name, "text": "x"} for name in ("cat/0.png", "dog/1.png")]
    images = {"cat/0.png": picture(0), "dog/1.png": picture(1)}
    assert opened(tmp_path, {**images, "metadata.csv": as_csv(rows)}).classes == ("cat", "dog")


def test_the_same_fault_of_many_tables_is_one_sentence(tmp_path: Path) -> None:
    files = {f"{folder}/{name}": data for folder in "abc" for name, data in IMAGES.items()}
    tables = {f"{folder}/metadata.csv": as_csv([{"file_name": "0.png", "text": "x"}]) for folder in "abc"}
    (warning,) = opened(tmp_path, {**files, **tables}).label_warnings
    assert warning.startswith("a/metadata.csv (and 2 others) has no column label")


def test_another_file_of_that_name_is_counted_as_unread(tmp_path: Path) -> None:
    source = opened(tmp_path, {**IMAGES, "metadata.csv": b"camera,lens\nx,y\n"})
    assert source.labels is None and source.label_warnings == () and "1 .csv" in source.warnings[0]


@every_form
def test_an_image_with_two_labels_is_named(tmp_path: Path, table: str, encode: Callable[[Rows], bytes]) -> None:
    twice = [*rows_of("ababab"), *rows_of(["a"], ["4.png"]), *rows_of(["a"], ["5.png"])]
    source = opened(tmp_path, {**IMAGES, table: encode(twice)})
    (warning,) = source.label_warnings
    assert source.labels is None and source.warnings == ()
    assert warning == (
        f"{table} gives 5.png the label 'a', and another row gives it 'b', so that no image has a class. Correct it, "
        "or pass --no-labels"
    )
    assert opened(tmp_path, {table: encode(twice[:-1])}).classes == ("a", "b")


def test_two_tables_that_differ_are_a_contradiction(tmp_path: Path) -> None:
    images = {f"a/{name}": data for name, data in IMAGES.items()}
    deep, top = as_csv(rows_of("ababab")), as_jsonl(rows_of("bbbbbb", list(images)))
    source = opened(tmp_path, {**images, "a/metadata.csv": deep, "metadata.jsonl": top})
    assert source.labels is None and "metadata.jsonl gives a/0.png the label 'b'" in source.label_warnings[0]


@every_form
def test_a_row_without_an_image_is_named_and_the_others_count(
    tmp_path: Path, table: str, encode: Callable[[Rows], bytes]
) -> None:
    rows = [*rows_of("ababab"), *rows_of("ab", ["absent.png", "also/absent.png"])]
    source = opened(tmp_path, {**IMAGES, table: encode(rows)})
    assert source.classes == ("a", "b")
    (warning,) = source.label_warnings
    assert warning.startswith(f"2 rows of {table} name no image of the source, such as 'absent.png'. Correct or remove")
    assert opened(tmp_path, {table: encode(rows[:6])}).label_warnings == ()


@every_form
def test_an_image_without_a_row_or_a_label_is_named(
    tmp_path: Path, table: str, encode: Callable[[Rows], bytes]
) -> None:
    for rows, image in ((rows_of("ababa", NAMES[1:]), "0.png"), (rows_of(["a", "b", "a", "b", "a", ""]), "5.png")):
        source = opened(tmp_path, {**IMAGES, table: encode(rows)})
        assert source.labels is None and source.label_warnings == (
            f"1 of 6 images have no class, such as {image}, so that no image has one. Complete {table}. Give each "
            "image a class, or pass --no-labels, which stores none",
        )


@pytest.mark.parametrize(
    ("table", "content", "says"),
    [
        ("metadata.csv", b"", "is empty or cannot be read as UTF-8"),
        ("metadata.csv", b'file_name,label\n0.png,"a\n', "is no CSV file"),
        ("metadata.csv", "file_name,label\n0.png,é\n".encode("latin-1"), "cannot be read as UTF-8"),
        ("metadata.jsonl", b'{"file_name": "0.png", "label": 1}\n[1]\n', "has no JSON object in line 2"),
        ("metadata.jsonl", b"[" * 100_000, "has no JSON object in line 1"),
        ("metadata.jsonl", as_jsonl(rows_of([[0, 1]] * 6)), "has the label [0, 1], which is neither"),
        ("metadata.jsonl", as_jsonl(rows_of([-2, 0] * 3)), "are both numbers and names, or negative"),
        ("metadata.jsonl", as_jsonl(rows_of([1, 2, 3, "a", "b", "c"])), "are both numbers and names, or negative"),
        ("metadata.parquet", b"PAR1 damaged PAR1", "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used_is_said(tmp_path: Path, table: str, content: bytes, says: str) -> None:
    if table.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'movq[parquet]'")
    source = opened(tmp_path, {**IMAGES, table: content})
    assert source.labels is None and len(source) == 6
    (warning,) = source.label_warnings
    assert table in warning and says in warning


def test_a_number_that_is_too_large_for_a_class_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"metadata\.csv in .* holds the class number 99999") as error:
        opened(tmp_path, {**IMAGES, "metadata.csv": as_csv(rows_of([0, 0, 0, 0, 0, 99999]))})
    assert "column label of a metadata file" in error.value.hint


@pytest.mark.parametrize("labels", [["a"] * 6, [0] * 6, [None] * 6, [-1] * 6])
def test_a_class_of_all_images_and_missing_labels_say_nothing(tmp_path: Path, labels: Sequence[object]) -> None:
    source = opened(tmp_path, {**IMAGES, "metadata.jsonl": as_jsonl(rows_of(labels))})
    assert source.labels is None and source.label_warnings == ()


def test_a_prepared_set_gets_the_classes_unless_they_are_declined(tmp_path: Path) -> None:
    written(tmp_path / "in", {**IMAGES, "metadata.csv": as_csv(rows_of(["dog", "cat"] * 3))})
    prepare(PrepareRequest(str(tmp_path / "in"), tmp_path / "out", val="2"), Console(quiet=True))
    made = PreparedSet.open(tmp_path / "out")
    labels = made.split("train").labels, made.split("val").labels
    assert made.manifest.classes == ("cat", "dog") and made.manifest.counts == {"train": 4, "val": 2}
    assert sorted(label for part in labels if part is not None for label in part.tolist()) == [0, 0, 0, 1, 1, 1]
    request = PrepareRequest(str(tmp_path / "in"), tmp_path / "none", val="2", keep_labels=False)
    prepare(request, Console(quiet=True))
    assert PreparedSet.open(tmp_path / "none").manifest.classes == ()
