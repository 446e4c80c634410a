"""Small files that declare huge sizes, or inflate to them, are refused in one line with little memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movq_cli.data.images import BadImageError
from movq_cli.errors import BadRequestError, MovqError
from movq_cli.evaluation.references import find_reference
from movq_cli.sources import temporary
from movq_cli.sources.open import open_source
from tests.sources.files import tarred, zipped

LIMIT = 3 * 2**30
"""Address space of a command, bytes: Python and its libraries take a part of it."""


def png(side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def npy(shape: str, descr: str = "'|u1'", body: bytes = bytes(100)) -> bytes:
    """Return an .npy file with any text in its header."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + body


@contextmanager
def little_memory(limit: int = 2**26) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


HEADERS = {
    "a billion images": npy("(1000000000, 64, 64, 3)"),
    "beyond 64 bits": npy("(10**3, 3)".replace("10**3", "1" + "0" * 40)),
    "negative": npy("(-1, 8, 8, 3)"),
    "huge sides": npy("(1, 1000000000, 1000000000, 3)"),
    "objects": npy("(1, 8, 8, 3)", "'|O'"),
    "structured": npy("(1, 8, 8, 3)", "[('a', '|u1')]"),
    "huge items": npy("(1, 8, 8, 3)", "'|S2000000000'"),
    "empty items": npy("(1000000000000, 8, 8, 3)", "'|V0'"),
    "nested": npy("(" * 90 + ")" * 90),
    "operators": npy("-" * 9000 + "1"),
    "long header": b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(100),
    "truncated": npy("(1, 8, 8, 3)")[:30],
    "text": b"none",
    "empty": b"",
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("name", HEADERS)
def test_an_array_that_promises_more_than_its_bytes_is_refused(tmp_path: Path, name: str, compression: int) -> None:
    path = zipped(tmp_path / "a.npz", {"arr_0.npy": HEADERS[name]}, compression)
    with little_memory(), pytest.raises(BadRequestError, match=r"a\.npz") as found:
        open_source(str(path))
    assert len(str(found.value)) < 500


@pytest.mark.parametrize("name", HEADERS)
def test_statistics_of_other_shapes_and_types_are_refused(tmp_path: Path, name: str) -> None:
    for key in ("mu", "sigma"):
        good = {"mu": npy("(2048,)", "'<f8'", bytes(2048 * 8)), "sigma": b""}
        path = zipped(tmp_path / "a.npz", {f"{k}.npy": v for k, v in (good | {key: HEADERS[name]}).items()})
        with little_memory(), pytest.raises(BadRequestError, match=r"a\.npz"):
            find_reference(str(path), tmp_path)


@pytest.mark.parametrize("wrong", ["cut", "flip", "none", "text", "nan", "protocol"])
def test_damaged_and_foreign_statistics_are_one_line(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "a.npz"
    sigma = np.eye(2048, dtype=np.float32)
    mu = np.full(2048, np.nan if wrong == "nan" else 0, np.float32)
    np.savez(path, mu=mu, sigma=sigma, protocol=np.array(json.dumps(["a list"])))
    data = bytearray(path.read_bytes())
    if wrong == "protocol":
        reference = find_reference(str(path), tmp_path)
        assert reference is not None and reference.protocol == {}
        return
    if wrong == "cut":
        data = data[:-1000]
    elif wrong == "flip":
        data[len(data) // 2] ^= 1
    elif wrong == "none":
        np.savez(path, samples=mu)
    elif wrong == "text":
        data = bytearray(b"none")
    if wrong != "none":
        path.write_bytes(data)
    message = "the arrays samples: neither images nor statistics" if wrong == "none" else "no statistics"
    with pytest.raises(BadRequestError, match=rf"a\.npz holds {message}"):
        find_reference(str(path), tmp_path)


def test_a_class_number_of_ten_billion_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 10**10]))
    with little_memory(), pytest.raises(BadRequestError, match=r"arr_1 of .*a\.npz holds the class number 10000000000"):
        open_source(str(path))
    np.savez(path, np.zeros((2, 8, 8, 3), np.uint8))  # what the message recommends
    assert open_source(str(path)).labels is None


@pytest.mark.parametrize(
    ("suffix", "text"), [("cls", "1" + "0" * 10), ("json", '{"label": 1e10}'), ("cls", "9" * 4000)]
)
def test_a_huge_class_number_in_a_tar_is_named(tmp_path: Path, suffix: str, text: str) -> None:
    path = tarred(tmp_path / "a.tar", {"0.png": png(), f"0.{suffix}": text.encode()})
    with (
        little_memory(),
        pytest.raises(BadRequestError, match=r"of 0\.png in .*a\.tar holds the class number"),
    ):
        open_source(str(path))
    assert open_source(str(tarred(tmp_path / "a.tar", {"0.png": png()}))).labels is None


@pytest.mark.parametrize("text", ['{"label": 1e999}', "[" * 100_000, '{"label": NaN}', "9" * 5000, '{"label": []}'])
def test_a_class_file_without_a_number_gives_no_class(tmp_path: Path, text: str) -> None:
    path = tarred(tmp_path / "a.tar", {"0.png": png(), "0.json": text.encode()})
    assert open_source(str(path)).labels is None


def header_with_size(size: bytes, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo("0.png")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SIZES = {
    "beyond the end": b"77777777777\0",
    "beyond 64 bits": b"\x80" + b"\x7f" * 11,
    "negative": b"\xff" * 10 + b"\xfc\x00",
    "just before": b"\xff" * 11 + b"\xff",
}


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S"])
@pytest.mark.parametrize("name", SIZES)
def test_a_tar_whose_members_exceed_it_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header_with_size(SIZES[name], kind) + bytes(2048))
    with little_memory(), pytest.raises(MovqError, match=r"a\.tar"):
        open_source(str(path))


def test_a_truncated_tar_names_its_last_member(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.tar", {"0.png": png(), "1.png": bytes(5000)})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(BadRequestError, match=r"a\.tar: its member '1.png' has 5000 bytes, but the archive ends"):
        open_source(str(path))


def test_a_tar_that_inflates_like_a_bomb_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary, "SMALL_COPY_BYTES", 2**21)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain = tarred(tmp_path / "a.tar", {"0.ppm": b"P6 2000 2000 255 " + bytes(12_000_000)}).read_bytes()
    path = tmp_path / "b.tar.gz"
    path.write_bytes(gzip.compress(plain))
    with little_memory(), pytest.raises(BadRequestError, match=r"b\.tar\.gz inflates .* decompress the archive first"):
        open_source(str(path))
    assert not list(tmp_path.glob("movq-*/*"))
    (tmp_path / "c.tar").write_bytes(gzip.decompress(path.read_bytes()))
    assert len(open_source(str(tmp_path / "c.tar")).read(0)) == 12_000_017


def test_an_npz_that_inflates_like_a_bomb_is_refused_and_its_remedy_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary, "SMALL_COPY_BYTES", 2**21)
    images = np.zeros((100, 200, 200, 3), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images)
    with pytest.raises(BadRequestError, match=r"a\.npz inflates .* numpy\.savez"):
        open_source(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", images)
    assert len(open_source(str(tmp_path / "a.npz"))) == 100


@pytest.mark.parametrize(
    ("compression", "limit"), [(zipfile.ZIP_DEFLATED, 2**24), (zipfile.ZIP_BZIP2, 2**27), (zipfile.ZIP_LZMA, 2**24)]
)
def test_a_member_that_inflates_beyond_its_declared_size_takes_little_memory(
    tmp_path: Path, compression: int, limit: int
) -> None:
    path = zipped(tmp_path / "a.zip", {"0.png": bytes(2 * limit)}, compression)
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        start = data.index(magic) + offset
        data[start : start + 4] = (100).to_bytes(4, "little")
    path.write_bytes(data)
    source = open_source(str(path))
    with little_memory(limit), pytest.raises(BadImageError):
        source.read(0)


def test_an_image_that_inflates_a_thousand_times_is_rejected_unread(tmp_path: Path) -> None:
    source = open_source(str(zipped(tmp_path / "a.zip", {"0.bmp": bytes(2**27)}, zipfile.ZIP_DEFLATED)))
    with little_memory(), pytest.raises(BadImageError, match="more than 100 times its size"):
        source.read(0)


def test_extents_beyond_the_file_take_no_memory(tmp_path: Path) -> None:
    from movq_cli.files import PositionalFiles

    (tmp_path / "a").write_bytes(b"abc")
    with little_memory():
        assert PositionalFiles().read(tmp_path / "a", 1, 2**50) == b"bc"
        assert PositionalFiles().read(tmp_path / "a", 2**50, 2**50) == b""


@pytest.mark.parametrize("size", [2**29 + 1, 2**40])
def test_a_list_of_gigabytes_is_refused_by_its_limit(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from movq_cli.sources import text_files

    monkeypatch.setattr(text_files, "MAX_TEXT_BYTES", 2**20)
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(size)
    with (
        little_memory(),
        pytest.raises(BadRequestError, match=r"a\.txt has more than 1048576 bytes, the limit"),
    ):
        open_source(str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\xfe\x80\xff\x01", r"a\.txt is no list: line 1 has more than"),
        (b"\xfe\x80\0\x01", r"cannot read the list .*a\.txt: it has bytes that are zero"),
    ],
)
def test_a_binary_file_is_no_list(tmp_path: Path, start: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(start + b"x" * 100_000)
    with pytest.raises(BadRequestError, match=message):
        open_source(str(tmp_path / "a.txt"))


def test_ranges_of_tars_have_a_limit() -> None:
    for pattern in ("a-{0..99999999999}.tar", "a-{0..999}-{0..999}.tar"):
        with little_memory(), pytest.raises(BadRequestError, match="stands for"):
            open_source(pattern)


def test_a_pipe_is_refused_instead_of_waiting_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for location in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(BadRequestError, match="is a device or a pipe"):
            open_source(location)


def test_folders_that_link_to_each_other_twice_end(tmp_path: Path) -> None:
    for level in range(40):
        (tmp_path / str(level)).mkdir()
        for name in "ab":
            (tmp_path / str(level) / name).symlink_to(tmp_path / str(level + 1))
    with pytest.raises(BadRequestError, match="links lead to the folder"):
        open_source(str(tmp_path / "0"))


NAMES = [
    "/etc/0.png",
    "../../0.png",
    "a/../../1.png",
    "\x1b[31mred\x1b[0m.png",
    "[red]2[/red].png",
    "[/].png",
    "a\nb.png",
]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_stay_in_their_folder(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        tarred(path, dict.fromkeys(NAMES, png()))
    else:
        zipped(path, dict.fromkeys(NAMES, png()))
    source = open_source(str(path))
    assert len(source) == len(NAMES)
    assert not any(name.startswith("/") or ".." in name.split("/") for name in source.names)


def limited(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a bounded address space."""
    return subprocess.run(
        [sys.executable, "-m", "movq_cli", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )


Make = Callable[[Path], object]
COMMANDS: dict[str, Make] = {
    "npz": lambda path: zipped(path, {"arr_0.npy": HEADERS["a billion images"]}),
    "labels": lambda path: np.savez(path, np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 10**10])),
    "tar": lambda path: path.write_bytes(header_with_size(SIZES["negative"]) + bytes(2048)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_prepare_refuses_it_in_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    COMMANDS[name](tmp_path / "in.npz")
    done = limited(tmp_path, "prepare", "in.npz", "out", "--workers", "0")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ") and "in.npz" in done.stderr


def test_prepare_rejects_bombs_names_the_limit_and_escapes_names(tmp_path: Path) -> None:
    bomb = tmp_path / "images" / "\x1b[2Jbomb.png"
    bomb.parent.mkdir()
    Image.new("1", (20_000, 20_000)).save(bomb)
    for index in range(4):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(bomb.parent / f"{index}.png")
    done = limited(tmp_path, "prepare", "images", "out", "--workers", "0", "--val", "2")
    assert done.returncode == 0, done.stderr
    (reject,) = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert reject["name"] == bomb.name
    assert "400000000 pixels is more than 134217728" in reject["reason"] and "--max-pixels" in reject["reason"]
    (tmp_path / "bad").mkdir()
    bomb.rename(tmp_path / "bad" / bomb.name)
    done = limited(tmp_path, "prepare", "bad", "other", "--workers", "0")
    assert done.returncode == 2
    assert "\x1b" not in done.stderr and r"\x1b[2Jbomb.png" in done.stderr


@pytest.mark.parametrize(
    ("size", "limit"), [((30, 20), 500), pytest.param((11_600, 11_600), None, marks=pytest.mark.slow)]
)
def test_the_limit_of_pixels_can_be_raised_as_its_message_says(
    tmp_path: Path, size: tuple[int, int], limit: int | None
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(2):
        Image.new("L", (16, 16), index).save(tmp_path / "images" / f"{index}.png")
    Image.new("1", size).save(tmp_path / "images" / "large.png")
    arguments = ["prepare", "images", "out", "--workers", "0", "--val", "1", "--size", "16", "--json"]
    lower = [] if limit is None else ["--max-pixels", str(limit)]
    done = limited(tmp_path, *arguments, *lower)
    assert json.loads(done.stdout)["rejected"] == 1, done.stderr
    assert "`movq prepare --max-pixels` raises" in (tmp_path / "out" / "rejects.jsonl").read_text()
    raised = ["--max-pixels", str(size[0] * size[1])]
    done = limited(tmp_path, *arguments, *raised)
    assert done.returncode == 2 and "other settings" in done.stderr
    shutil.rmtree(tmp_path / "out")
    done = limited(tmp_path, *arguments, *raised)
    assert json.loads(done.stdout)["rejected"] == 0, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["max_pixels"] == size[0] * size[1]
