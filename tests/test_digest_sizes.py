"""JSON files are read up to a size, and large files of weights are hashed once in a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from movq_cli import digests, files
from movq_cli.data.shards import DatasetManifest
from movq_cli.errors import BadRequestError


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate(2**32)  # A file of holes takes no space.
    with pytest.raises(BadRequestError, match=r"manifest\.json is damaged, .* over 67108864 bytes\. Remove it\."):
        digests.read_header(path, DatasetManifest, "Remove it.")


def test_a_result_of_evaluate_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with path.open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(BadRequestError, match="over 67108864 bytes"):
        digests.read_json(path, "Make it again.")


def test_a_file_is_hashed_again_only_after_a_change(tmp_path: Path) -> None:
    path, folder = tmp_path / "weights.pth", tmp_path / "moved"
    path.write_bytes(b"1" * 1000)
    first = files.sha256_once(path)
    assert first == files.sha256(path)
    status = path.stat()
    with path.open("r+b") as file:  # A change that neither the size nor the time shows is not noticed.
        file.write(b"2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files.sha256_once(path) == first
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert files.sha256_once(path) == files.sha256(path) != first
    folder.mkdir()
    path.rename(folder / path.name)
    assert files.sha256_once(folder / path.name) == files.sha256(folder / path.name)
