"""File systems that allow less: no fsync of folders, no hard links, read-only caches, damaged neighbours."""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path

import numpy as np
import pytest
import torch

from movq_cli import files, runs
from movq_cli.app import app
from movq_cli.console import Console
from movq_cli.errors import FailureError
from movq_cli.evaluation import feature_cache
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.settings import Preset
from tests.evaluation.test_feature_cache import Means, write
from tests.test_runs import write_run

CPU = torch.device("cpu")
UNWRITABLE = Path("/proc/self/movq")
"""A folder that nobody can make, not even root."""


def features(images: Path, cache: Path) -> feature_cache.Features:
    console = Console()
    opened = ImageSet("real", str(images), "val", console=console)
    return feature_cache.cached_features(opened, Means(), cache, batch_size=4, device=CPU, console=console)


def test_a_folder_that_cannot_be_written_to_the_disk_is_no_error() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(os.open("/proc/self", os.O_RDONLY))
    files._sync(Path("/proc/self"))


def test_a_disk_that_fails_remains_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FailureError, match="Input/output error"):
        files.atomic_write(tmp_path / "file", b"data")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL])
def test_hard_links_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    files.write_once(tmp_path / "file", b"first")
    files.write_once(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    files.link_or_copy(tmp_path / "file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "file"]


def test_a_feature_cache_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write(tmp_path / "images")
    found = features(images, UNWRITABLE)
    assert "the feature cache /proc/self/movq cannot be written" in capsys.readouterr().err
    assert torch.equal(found.rows, features(images, tmp_path / "cache").rows)
    assert "cannot be written" not in capsys.readouterr().err


def test_statistics_that_cannot_be_stored_are_computed(tmp_path: Path) -> None:
    images = write(tmp_path / "images")
    found = features(images, tmp_path / "cache")
    blocked = found.folder / "statistics.npz.partial"
    blocked.mkdir()  # A file of this name cannot be made.
    computed = found.statistics(CPU)
    assert not (found.folder / "statistics.npz").exists()
    blocked.rmdir()
    for one, other in zip(computed, found.statistics(CPU), strict=True):
        assert np.array_equal(one, other)
    assert (found.folder / "statistics.npz").exists()


def test_a_user_without_a_home_folder_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_user: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert files.is_writable(files.cache_folder())


def test_a_damaged_run_does_not_end_the_search_for_another_one(
    tmp_path: Path, tiny: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "whole", "vq", tiny, "2026-01-01")
    for name, content in (("empty", b""), ("foreign", b"{}"), ("binary", b"\xff\xfe")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_bytes(content)
    (tmp_path / "folder" / "run.json").mkdir(parents=True)
    assert runs.find_run(None, "vq", root=tmp_path) == run
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("warning: the run in ") and " is passed over: " in line for line in lines)


def test_a_damaged_preset_does_not_end_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "presets").mkdir()
    for name, content in (("torn", b"vq: {"), ("binary", b"\xff\xfe\x00"), ("unknown", b"no_such_setting: 1\n")):
        (tmp_path / "presets" / f"{name}.yaml").write_bytes(content)
    (tmp_path / "presets" / "folder.yaml").mkdir()
    monkeypatch.chdir(tmp_path)
    app(["presets"], standalone_mode=False)
    shown = capsys.readouterr()
    assert "ffhq" in shown.out
    assert shown.err.count(" is passed over: ") == 4
