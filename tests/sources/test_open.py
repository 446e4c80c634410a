"""Images are found wherever they are, under names that are safe, with the labels their folders give."""

import io
import multiprocessing
import os
import pickle
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from movq_cli.data.images import BadImageError, decode, encode_png
from movq_cli.errors import BadRequestError
from movq_cli.sources import labels, source
from movq_cli.sources.arrays import npz_arrays
from movq_cli.sources.open import open_source


def picture(value):
    return encode_png(Image.new("RGB", (4, 4), (value, value, value)))


def fill(folder, *names):
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(value))
    return folder


def zipped(path, names, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for value, name in enumerate(names):
            archive.writestr(zipfile.ZipInfo(name), picture(value))
    return path


def tarred(path, names, mode="w"):
    with tarfile.open(path, mode) as archive:
        for value, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(picture(value))
            archive.addfile(info, io.BytesIO(picture(value)))
    return path


def values(source):
    """Which picture each name leads to."""
    return {name: int(np.asarray(decode(source.read(i)))[0, 0, 0]) for i, name in enumerate(source.names)}


# Folders


def test_a_folder_is_listed_to_any_depth_without_hidden_files(tmp_path):
    fill(tmp_path, "b.png", "a/deep/er/x.JPG", "a/y.webp", ".hidden.png", ".git/z.png", "__MACOSX/a.png", "n/.h/q.png")
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(str(tmp_path))
    assert values(source) == {"a/deep/er/x.JPG": 1, "a/y.webp": 2, "b.png": 0}
    assert source.labels is None and source.splits is None and source.classes == () and len(source) == 3
    assert list(source.names) == sorted(source.names)


def test_unicode_long_spaced_and_undecodable_names(tmp_path):
    names = ["数字/图 像.png", "n" * 240 + ".png", "new\nline.png", "quo'te\".png", "b\\s.png"]
    fill(tmp_path, *names)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")).write_bytes(picture(9))
    source = open_source(str(tmp_path))
    assert values(source) == {**{name: i for i, name in enumerate(names)}, "\udcff\udcfe.png": 9}


def test_links_are_followed_but_not_in_circles(tmp_path):
    real = fill(tmp_path / "elsewhere", "c/1.png")
    root = fill(tmp_path / "root", "a/0.png", "b/1.png")
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "a" / "other").symlink_to(root / "b")
    (root / "b" / "other").symlink_to(root / "a")
    (root / "far").symlink_to(real)
    source = open_source(str(root))
    assert {"a/0.png", "b/1.png", "far/c/1.png", "a/other/1.png", "b/other/0.png", "loop.png"} == set(source.names)
    with pytest.raises(BadImageError, match="cannot be read"):
        source.read(source.names.index("loop.png"))


def test_a_vanished_or_dangling_file_is_a_bad_image(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "c.png").symlink_to("nowhere")
    (tmp_path / "d.png").mkdir()
    source = open_source(str(tmp_path))
    (tmp_path / "a.png").unlink()
    for index in (0, 2):
        with pytest.raises(BadImageError, match=r"^cannot be read: No such file or directory$"):
            source.read(index)
    assert source.read(1) == picture(1)


def test_a_huge_file_is_refused_unread(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadImageError, match="is more than"):
        open_source(str(tmp_path)).read(0)


@pytest.mark.parametrize("make", [lambda p: p, lambda p: fill(p, ".a.png"), lambda p: (p / "a.txt").touch()])
def test_a_folder_without_images_is_a_bad_request(tmp_path, make):
    make(tmp_path)
    with pytest.raises(BadRequestError, match=r"^no image in .*png"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("spec", ["", "/no/such", "digit", "n" * 5000])
def test_an_unknown_source_is_a_bad_request_with_a_suggestion(spec):
    with pytest.raises(BadRequestError) as caught:
        open_source(spec)
    assert spec != "digit" or "'digits'" in str(caught.value)


def test_a_path_wins_over_the_name_of_a_set(tmp_path, monkeypatch):
    fill(tmp_path / "digits", "only.png")
    monkeypatch.chdir(tmp_path)
    assert open_source("digits").names == ("only.png",)


def test_an_unreadable_folder_is_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    fill(tmp_path, "a/0.png")
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(BadRequestError, match=r"cannot read .*/a: Permission denied"):
            open_source(str(tmp_path))
    finally:
        (tmp_path / "a").chmod(stat.S_IRWXU)


def test_a_single_image(tmp_path):
    fill(tmp_path, "one.PNG", "two.png")
    source = open_source(str(tmp_path / "one.PNG"))
    assert values(source) == {"one.PNG": 0} and source.splits is None and source.labels is None


# Labels and splits

CASES = {
    "classes": (["cat/1.png", "dog/x/2.png"], None, [0, 1], ["cat", "dog"]),
    "sorted": (["n02/1.png", "n01/2.png", "n10/3.png"], None, [1, 0, 2], ["n01", "n02", "n10"]),
    "one folder": (["cat/1.png", "cat/2.png"], None, None, []),
    "beside": (["cat/1.png", "dog/2.png", "3.png"], None, None, []),
    "common top": (["set/v1/cat/1.png", "set/v1/dog/2.png"], None, [0, 1], ["cat", "dog"]),
    "splits": (["train/1.png", "val/2.png"], "tv", None, []),
    "split classes": (
        ["train/a/1.png", "train/b/2.png", "validation/b/3.png"],
        "ttv",
        [0, 1, 1],
        ["a", "b"],
    ),
    "top, splits, classes": (["d/train/a/1.png", "d/train/b/1.png", "d/val/b/1.png"], "ttv", [0, 1, 1], ["a", "b"]),
    "flat val": (["train/a/1.png", "train/b/2.png", "val/3.png"], "ttv", None, []),
    "only train": (["train/a/1.png", "train/b/2.png"], None, [0, 1], ["a", "b"]),
    "no val": (["other/1.png", "train/1.png"], None, [0, 1], ["other", "train"]),
    "flat": (["1.png", "2.png"], None, None, []),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_folders_give_labels_and_splits(tmp_path, case, kind):
    names, splits, labels, classes = CASES[case]
    if kind == "folder":
        path = fill(tmp_path / "folder", *names)
    elif kind == "zip":
        path = zipped(tmp_path / "x.zip", names)
    else:
        path = tarred(tmp_path / "x.tar", names)
    source = open_source(str(path))
    assert sorted(names) == list(source.names)
    order = [names.index(name) for name in source.names]
    assert source.labels == (labels and tuple(labels[i] for i in order))
    assert source.classes == tuple(classes)
    assert source.splits == (splits and tuple({"t": "train", "v": "val"}[splits[i]] for i in order))


def test_one_split_can_be_requested(tmp_path):
    fill(tmp_path, "train/a/1.png", "val/b/2.png", "train/b/3.png")
    source = open_source(str(tmp_path), "val")
    assert values(source) == {"val/b/2.png": 1}
    assert source.labels == (1,) and source.classes == ("a", "b") and source.splits == ("val",)
    assert values(open_source(str(tmp_path), "train")) == {"train/a/1.png": 0, "train/b/3.png": 2}
    with pytest.raises(BadRequestError, match="has no val split"):
        open_source(str(fill(tmp_path / "train")), "val")


# Archives


def test_a_members_path_is_only_a_name(tmp_path):
    names = ["../../etc/a.png", "/abs/b.png", "./c.png", "c.png", "x\\y.png", "C:/d.png", "..", "e.png/"]
    for path in (zipped(tmp_path / "a.zip", names), tarred(tmp_path / "a.tar", names[:-1])):
        before = sorted(tmp_path.rglob("*"))
        source = open_source(str(path))
        found = values(source)
        assert found["etc/a.png"] == 0 and found["abs/b.png"] == 1 and found["C:/d.png"] == 5
        assert {found["c.png"], found["c~2.png"]} == {2, 3}
        assert len(found) == 6
        assert not any(PurePosixPath(name).is_absolute() or ".." in name.split("/") for name in found)
        assert sorted(tmp_path.rglob("*")) == before


def test_case_clashing_and_repeated_names_in_a_zip(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = zipped(tmp_path / "a.zip", ["A/x.png", "a/x.png", "a/X.png", "a/x.png"])
    assert values(open_source(str(path))) == {"A/x.png": 0, "a/X.png": 2, "a/x.png": 3}


class UnusedReader:
    """Reader of a source whose images nobody may read."""

    def read(self, member: int) -> bytes:
        raise AssertionError(f"member {member} was read")


@given(st.lists(st.text("aA./\\~2é", min_size=1, max_size=6).map(lambda name: name + ".png"), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_names_are_relative_unique_and_lose_no_image(names):
    names = list(dict.fromkeys(names))
    try:
        found = labels.assemble("location", names, UnusedReader())
    except BadRequestError:
        assert all(any(part.startswith(".") for part in labels._safe_name(name).split("/")) for name in names)
        return
    visible = [name for name in names if not any(p.startswith(".") for p in labels._safe_name(name).split("/"))]
    assert sorted(found.members) == [i for i, name in enumerate(names) if name in visible]
    assert len(set(found.names)) == len(found.names) and list(found.names) == sorted(found.names)
    for name in found.names:
        assert name and not {"", ".", ".."} & set(name.split("/"))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_of_any_compression(tmp_path, method):
    path = tmp_path / "set.dat"  # the content decides, not the suffix
    with zipfile.ZipFile(path, "w", method) as archive:
        for value in range(3):
            archive.writestr(f"{value}.png", picture(value))
    assert values(open_source(str(path))) == {"0.png": 0, "1.png": 1, "2.png": 2}


def test_a_damaged_member_is_a_bad_image_and_the_others_are_fine(tmp_path):
    path = zipped(tmp_path / "a.zip", ["a.png", "b.png"])
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT")] ^= 255
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(BadImageError, match="cannot be read: Bad CRC"):
        source.read(0)
    assert source.read(1) == picture(1)


def test_an_encrypted_member_is_a_bad_image(tmp_path):
    path = zipped(tmp_path / "a.zip", ["a.png"])
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(BadImageError, match="encrypted"):
        open_source(str(path)).read(0)


def test_a_zip_bomb_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_FILE_BYTES", 2**24)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as member:
        for _ in range(17):
            member.write(b"\0" * 2**20)
    assert path.stat().st_size < 2**18
    with pytest.raises(BadImageError, match="is more than"):
        open_source(str(path)).read(0)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_plain_and_compressed(tmp_path, mode):
    path = tarred(
        tmp_path / f"a.tar{mode[1:].replace(':', '.')}", ["b/1.png", "a/0.png", "a/" + "n" * 150 + ".png"], mode
    )
    source = open_source(str(path))
    assert values(source) == {"a/0.png": 1, "a/" + "n" * 150 + ".png": 2, "b/1.png": 0}
    assert source.classes == ("a", "b")


def test_links_devices_and_repeated_members_in_a_tar(tmp_path):
    path = tarred(tmp_path / "a.tar", ["a.png", "b.png", "a.png"])
    with tarfile.open(path, "a") as archive:
        for kind, name in [(tarfile.SYMTYPE, "s.png"), (tarfile.LNKTYPE, "h.png"), (tarfile.CHRTYPE, "d.png")]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert values(open_source(str(path))) == {"a.png": 2, "b.png": 1}


def test_the_decompressed_copy_goes_when_the_process_ends(tmp_path):
    path = tarred(tmp_path / "a.tar.gz", ["a.png"], "w:gz")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = (
        "import os, sys; from movq_cli.sources.open import open_source\n"
        "source = open_source(sys.argv[1]); assert source.read(0)\n"
        "assert len(os.listdir(os.environ['TMPDIR'])) == 1"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], env={**os.environ, "TMPDIR": str(temporary)}, check=False
    )
    assert run.returncode == 0 and not list(temporary.iterdir())


def test_no_room_for_the_decompressed_copy_is_a_failure(tmp_path):
    path = tarred(tmp_path / "a.tar.gz", ["a.png"], "w:gz")
    code = (
        "import resource, sys; from movq_cli.sources.open import open_source\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))\n"
        "from movq_cli.errors import FailureError\n"
        "try: open_source(sys.argv[1])\n"
        "except FailureError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "cannot decompress" in run.stdout and "TMPDIR" in run.stdout and run.stderr == ""


# WebDataset


def sharded(path, count, start, label=None):
    """A shard of three files a sample: the image, its class and a caption."""
    with tarfile.open(path, "w") as archive:
        for number in range(start, start + count):
            parts = {"png": picture(number), "txt": b"a picture", **({} if label is None else label(number))}
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{number - start:04d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "label",
    [
        lambda number: {"cls": str(number % 3).encode()},
        lambda number: {"CLS": f"{number % 3}\n".encode()},
        lambda number: {"json": b'{"label": %d, "width": 9}' % (number % 3)},
    ],
)
@pytest.mark.parametrize("how", ["folder", "pattern", "one"])
def test_shards_of_webdataset_give_images_and_the_class_of_the_same_key(tmp_path, label, how):
    (tmp_path / "sets").mkdir()
    for shard in range(3):
        sharded(tmp_path / "sets" / f"x-{shard:03d}.tar", 4, 4 * shard, label)
    (tmp_path / "sets" / "README.md").write_text("about")
    spec = {"folder": "sets", "pattern": "sets/x-{000..002}.tar", "one": "sets/x-001.tar"}[how]
    source = open_source(str(tmp_path / spec))
    expected = range(4, 8) if how == "one" else range(12)
    prefix = {number: "" if how == "one" else f"x-{number // 4:03d}/" for number in expected}
    assert values(source) == {f"{prefix[number]}{number % 4:04d}.png": number for number in expected}
    assert source.labels == tuple(number % 3 for number in expected) and source.classes == ("0", "1", "2")
    assert source.splits is None


def test_shards_without_usable_classes_have_none_and_their_names_tell_the_split(tmp_path):
    for text in (b"", b"cat", b"-1", b"1.5"):
        sharded(tmp_path / "a.tar", 3, 0, lambda number, text=text: {"cls": text if number else b"1"})
        assert open_source(str(tmp_path / "a.tar")).labels is None
    for text in (b"[]", b"{", b'{"label": "cat"}', b'{"caption": "x"}'):
        sharded(tmp_path / "a.tar", 3, 0, lambda number, text=text: {"json": text})
        assert open_source(str(tmp_path / "a.tar")).labels is None
    (tmp_path / "a.tar").unlink()
    sharded(tmp_path / "imagenet1k-train-00.tar", 2, 0)
    sharded(tmp_path / "imagenet1k-validation-00.tar", 2, 2)
    source = open_source(str(tmp_path))
    assert source.splits == ("train", "train", "val", "val") and source.classes == ()
    assert values(open_source(str(tmp_path), "val")) == {
        "imagenet1k-validation-00/0000.png": 2,
        "imagenet1k-validation-00/0001.png": 3,
    }


def test_a_missing_or_broken_shard_is_named(tmp_path):
    sharded(tmp_path / "x-0.tar", 2, 0)
    with pytest.raises(BadRequestError, match=r"x-1\.tar: No such file"):
        open_source(str(tmp_path / "x-{0..1}.tar"))
    (tmp_path / "x-1.tar").write_bytes(b"no tar")
    for spec in ("", "x-{0..1}.tar"):
        with pytest.raises(BadRequestError, match=r"x-1\.tar is neither"):
            open_source(str(tmp_path / spec))


def test_tars_beside_images_are_not_opened(tmp_path):
    sharded(tmp_path / "a.tar", 2, 0)
    fill(tmp_path, "b.png")
    assert open_source(str(tmp_path)).names == ("b.png",)


# Lists


def test_a_list_names_files_from_its_folder_on_and_perhaps_their_classes(tmp_path):
    fill(tmp_path / "in", "b/1.png", ".h/2.png", "3.data")
    far = fill(tmp_path / "far", "x 数.png") / "x 数.png"
    lines = ["in/b/1.png\tdog", "in/.h/2.png\tcat", "", "in/3.data\tdog", f"{far}\tcat", "../gone.png\tdog"]
    (tmp_path / "list.txt").write_text("\r\n".join(lines))
    source = open_source(str(tmp_path / "list.txt"))
    names = ["gone.png", "in/.h/2.png", "in/3.data", "in/b/1.png", str(far).removeprefix("/")]
    assert list(source.names) == sorted(names) and source.classes == ("cat", "dog")
    assert source.labels is not None
    labels = dict(zip(source.names, source.labels, strict=True))
    assert labels == dict(zip(names, [1, 0, 1, 1, 0], strict=True))
    assert source.read(source.names.index(names[4])) == picture(0)
    with pytest.raises(BadImageError, match="No such file"):
        source.read(source.names.index("gone.png"))
    (tmp_path / "list.txt").write_text("in/b/1.png\tdog\nin/3.data\n")
    assert open_source(str(tmp_path / "list.txt")).labels is None


def test_a_list_of_nothing_that_is_there_is_a_bad_request(tmp_path):
    for text in ("", "a.png\nb.png"):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(BadRequestError, match=r"none of the \d images that .*list\.txt lists exists"):
            open_source(str(tmp_path / "list.txt"))


# Arrays


def pictures(count):
    return np.random.default_rng(0).integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_pixels_and_classes(tmp_path, save):
    pixels = pictures(3)
    save(tmp_path / "a.npz", pixels, np.array([2, 0, 1]))
    source = open_source(str(tmp_path / "a.npz"))
    assert source.names == ("000000.png", "000001.png", "000002.png")
    assert source.labels == (2, 0, 1) and source.classes == ("0", "1", "2") and source.splits is None
    for index in (2, 0, 1):
        assert np.array_equal(np.asarray(decode(source.read(index))), pixels[index])
    assert npz_arrays(tmp_path / "a.npz") == {"arr_0", "arr_1"}


@pytest.mark.parametrize("labels", [None, [1, 2], [0.0, 1.0, 2.0], [0, -1, 2]])
def test_an_npz_without_usable_classes_has_none(tmp_path, labels):
    np.savez(tmp_path / "a.npz", pictures(3), *([] if labels is None else [np.array(labels)]))
    source = open_source(str(tmp_path / "a.npz"))
    assert len(source) == 3 and source.labels is None and source.classes == ()


@pytest.mark.parametrize("wrong", [pictures(2)[0], pictures(2)[..., :1], pictures(2) / 255, pictures(0)])
def test_an_npz_of_something_else_is_a_bad_request(tmp_path, wrong):
    np.savez(tmp_path / "a.npz", wrong)
    with pytest.raises(BadRequestError, match=r"a\.npz holds .* as arr_0, not images: uint8 \[N, H, W, 3\]"):
        open_source(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", mu=wrong)
    with pytest.raises(BadRequestError, match=r"b\.npz holds the arrays mu, and no arr_0"):
        open_source(str(tmp_path / "b.npz"))


def test_an_npz_with_pickled_or_missing_bytes_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", np.array([{}], dtype=object))
    with pytest.raises(BadRequestError, match=r"a\.npz"):
        open_source(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", pictures(3))
    source = open_source(str(tmp_path / "b.npz"))
    os.truncate(tmp_path / "b.npz", 250)
    with pytest.raises(BadImageError, match="truncated"):
        source.read(2)


def _damaged(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode_png(Image.fromarray(noise))
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.png", data)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            info = tarfile.TarInfo("a.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    whole = path.read_bytes()
    path.write_bytes(whole[: 6000 if kind == "tar" else len(whole) // 2])
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_truncated_archive_is_one_line(tmp_path, kind):
    path = _damaged(tmp_path, kind)
    with pytest.raises(BadRequestError) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"), [("a.zip", b""), ("a.tar", b""), ("a.txt", b"hello"), ("a.tgz", b"\x1f\x8bxx")]
)
def test_what_is_no_archive_is_a_bad_request(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadRequestError, match=name):
        open_source(str(tmp_path / name))


def test_an_archive_without_images_is_a_bad_request(tmp_path):
    for path in (
        zipped(tmp_path / "a.zip", ["a.txt"]),
        zipped(tmp_path / "b.zip", []),
        tarred(tmp_path / "a.tar", ["x"]),
    ):
        with pytest.raises(BadRequestError, match="no image in"):
            open_source(str(path))


# Processes

_kept: dict[str, source.Source] = {}


def _keep(source):
    _kept["source"] = source


def _check(i):
    source = _kept["source"]
    index = i % len(source)
    return decode(source.read(index)) == decode(picture(int(PurePosixPath(source.names[index]).stem)))


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "npz"])
@pytest.mark.parametrize("method", ["fork", "pickle"])
def test_sources_are_read_by_several_processes_at_once(tmp_path, kind, method):
    names = [f"{i}.png" for i in range(50)]
    if kind == "folder":
        path = fill(tmp_path / "folder", *names)
    elif kind == "zip":
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for value, name in enumerate(names):
                archive.writestr(name, picture(value))
    elif kind == "npz":
        path = tmp_path / "a.npz"
        np.savez(path, np.stack([np.full((4, 4, 3), value, np.uint8) for value in range(50)]))
    else:
        path = tarred(tmp_path / f"a.{kind}", names, "w:gz" if kind == "tar.gz" else "w")
    source = open_source(str(path))
    _keep(source)
    assert all(map(_check, range(5)))  # its handle is open before the fork
    copy = pickle.loads(pickle.dumps(source)) if method == "pickle" else source
    with multiprocessing.get_context("fork").Pool(2, initializer=_keep, initargs=(copy,)) as pool:
        results = pool.map_async(_check, range(600), chunksize=20)
        assert all(map(_check, range(600)))
        assert all(results.get(20))
