"""A digest finds every change of a file, wherever it stands in the file."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from movq_cli import digests
from movq_cli.digests import NO_DIGEST, Header
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_file


class Example(Header):
    name: str
    numbers: list[int]


def example() -> Example:
    return Example(name="ü\n", numbers=list(range(100)))


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with atomic_file(path) as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        digests.append_to_zip(file)


def test_a_digest_is_the_hash_of_the_file_with_zeros_in_its_place(tmp_path: Path) -> None:
    digests.write_header(tmp_path / "f.json", example())
    write_zip(tmp_path / "f.zip", {"a": b"abc" * 100_000})
    digests.write(tmp_path / "f.safetensors", save({"a": torch.arange(999)}, {"movq": NO_DIGEST}))
    for path in tmp_path.iterdir():
        stored = digests.stored_in(path)
        assert stored is not None
        content = path.read_bytes()
        assert content.count(stored.encode()) == 1
        zeroed = content.replace(stored.encode(), b"xxh3-128:" + b"0" * 32)
        assert stored == "xxh3-128:" + xxhash.xxh3_128_hexdigest(zeroed)


def test_the_files_can_be_read_by_other_programs(tmp_path: Path) -> None:
    digests.write_header(tmp_path / "f.json", example())
    assert json.loads((tmp_path / "f.json").read_text())["name"] == "ü\n"
    write_zip(tmp_path / "f.zip", {"a": b"abc"})
    with zipfile.ZipFile(tmp_path / "f.zip") as archive:
        assert archive.testzip() is None and archive.read("a") == b"abc"
    digests.write(tmp_path / "f.safetensors", save({"a": torch.arange(9)}, {"movq": NO_DIGEST}))
    assert torch.equal(load_file(tmp_path / "f.safetensors")["a"], torch.arange(9))
    with atomic_file(tmp_path / "f.npz") as file:
        np.savez(file, a=np.arange(9))
        digests.append_to_zip(file)
    with np.load(tmp_path / "f.npz") as arrays:
        np.testing.assert_array_equal(arrays["a"], np.arange(9))
    with atomic_file(tmp_path / "f.pt") as file:
        torch.save({"a": torch.arange(9)}, file)
        digests.append_to_zip(file)
    for mmap in (False, True):
        state = torch.load(tmp_path / "f.pt", weights_only=True, mmap=mmap)
        assert torch.equal(state["a"], torch.arange(9))


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the content of small files of each format."""
    folder = tmp_path_factory.mktemp("intact")
    digests.write_header(folder / "f.json", example())
    write_zip(folder / "f.zip", {"a": b"abc" * 100, "manifest.json": (folder / "f.json").read_bytes()})
    digests.write(folder / "f.safetensors", save({"a": torch.arange(99)}, {"movq": NO_DIGEST}))
    with atomic_file(folder / "f.pt") as file:
        torch.save({"a": torch.arange(99)}, file)
        digests.append_to_zip(file)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def require_intact(path: Path) -> None:
    if path.suffix == ".json":
        digests.read_header(path, Example, "Make it again.")
    else:
        digests.check(path, "Make it again.")


@pytest.mark.parametrize("name", ["f.json", "f.zip", "f.safetensors", "f.pt"])
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_changed_byte_and_every_other_length_is_found(
    intact: dict[str, bytes], tmp_path: Path, name: str, data: st.DataObject
) -> None:
    path, content = tmp_path / name, intact[name]
    path.write_bytes(content)
    require_intact(path)
    index = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[index] ^= 1 << bit
    inserted = data.draw(st.binary(min_size=1, max_size=3))
    for damaged in (bytes(changed), content[:index], content[:index] + inserted + content[index:]):
        path.write_bytes(damaged)
        with pytest.raises(BadRequestError, match=name):
            require_intact(path)


def test_large_files_are_hashed_in_blocks_that_may_cut_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zip(tmp_path / "f.zip", {"a": random.Random(0).randbytes(1000)})
    size = (tmp_path / "f.zip").stat().st_size
    for block in (1, 7, size - 40, size - 20, size - 1, size, size + 1):
        monkeypatch.setattr(digests, "_BLOCK_BYTES", block)
        assert digests.check(tmp_path / "f.zip", "")


def test_a_file_without_a_digest_is_accepted_only_if_none_is_required(tmp_path: Path) -> None:
    path = tmp_path / "f.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", digests.encode_header(example()))  # The digest of a member is not the file's.
    assert digests.stored_in(path) is None
    assert not digests.check(path, "", required=False)
    with pytest.raises(BadRequestError, match=r"has no digest\. Make it again\."):
        digests.check(path, "Make it again.")


def test_a_json_file_of_another_version_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(digests.with_digest(json.dumps({"digest": NO_DIGEST, "name": "a", "extra": 1}).encode()))
    with pytest.raises(BadRequestError, match=r"written by another version of movq \(numbers: Field required\)"):
        digests.read_header(path, Example, "")
    path.write_text('{"name": "a", "numbers": []}')
    assert digests.read_header(path, Example, "") == Example(name="a", numbers=[])
    with pytest.raises(FileNotFoundError):
        digests.read_header(tmp_path / "none", Example, "")
    with pytest.raises(BadRequestError, match="cannot be read: Is a directory"):
        digests.read_header(tmp_path, Example, "")


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    digests.write_header(tmp_path / "f", example())
    header = digests.read_header(tmp_path / "f", Example, "")
    assert header == example()
    digests.write_header(tmp_path / "f", header)
    assert digests.read_header(tmp_path / "f", Example, "") == example()


def test_a_comment_is_not_appended_twice() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"b")
    digests.append_to_zip(buffer)
    with pytest.raises(AssertionError, match="has a comment"):
        digests.append_to_zip(buffer)
