"""Files are complete or absent, and the error of a failed write names its cause."""

from __future__ import annotations

import multiprocessing
import pickle
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from movq_cli import files
from movq_cli.errors import FailureError
from movq_cli.files import PositionalFiles, atomic_file, atomic_write, write_once


def test_a_write_creates_the_parent_folders_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_the_temporary_file_of_a_killed_run_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f.partial").write_bytes(b"x" * 1000)
    atomic_write(tmp_path / "f", b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("f", b"new")]


def test_two_writers_of_one_file_use_temporary_files_of_their_own(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "f", concurrent=True) as one, atomic_file(tmp_path / "f", concurrent=True) as two:
        one.write(b"one")
        two.write(b"two")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("f", b"one")]


def test_of_several_writers_of_a_new_file_one_succeeds_completely(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_once(tmp_path / "a" / "f", bytes([n]) * 100_000), range(32)))
    (path,) = (tmp_path / "a").iterdir()
    assert path.name == "f" and len(path.read_bytes()) == 100_000 and len(set(path.read_bytes())) == 1
    before = path.read_bytes()
    write_once(path, b"later")
    assert path.read_bytes() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_keeps_the_old_file_and_is_raised(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("f", b"old")]


def test_a_full_device_is_a_failure_that_names_the_path(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with (
        pytest.raises(FailureError, match=r"cannot write .*f: No space left.*Free some space"),
        atomic_file(path),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert not list(tmp_path.iterdir())


def test_a_real_limit_on_file_size_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    code = (
        "import sys; from pathlib import Path; from movq_cli.files import atomic_write\n"
        "from movq_cli.errors import FailureError\n"
        "try: atomic_write(Path(sys.argv[1]), b'x' * 100_000)\n"
        "except FailureError as error: print(error); sys.exit(1)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        check=False,
    )
    assert (run.returncode, run.stderr) == (1, "")
    assert str(path) in run.stdout and "File too large" in run.stdout and len(run.stdout.splitlines()) == 1
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("f", b"old")]


def test_a_folder_at_the_path_and_a_file_as_parent_are_failures(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "folder", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(FailureError) as caught:
            atomic_write(path, b"x")
        assert str(path) in str(caught.value) and caught.value.hint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_an_unwritable_folder_is_a_failure() -> None:
    with pytest.raises(FailureError, match="cannot write /proc/"):
        atomic_write(Path("/proc/nowhere/f"), b"x")


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from movq_cli.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    atomic_write(path, b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("f", b"new")]


def test_positional_reads_across_forks_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 400)
    files = PositionalFiles()
    assert files.read(path, 0, 1) == b"\0"  # opened before the fork: the descriptor is shared
    with multiprocessing.get_context("fork").Pool(2, initializer=_inherit, initargs=(files, path)) as pool:
        results = pool.map_async(_read_inherited, range(2000))
        assert all(files.read(path, i, 2) == bytes([i % 256, (i + 1) % 256]) for i in range(2000))
        assert all(results.get(10))


_inherited: dict[str, tuple[PositionalFiles, Path]] = {}


def _inherit(files: PositionalFiles, path: Path) -> None:
    _inherited["both"] = files, path


def _read_inherited(i: int) -> bool:
    files, path = _inherited["both"]
    return files.read(path, i, 2) == bytes([i % 256, (i + 1) % 256])


def test_threads_read_many_files_at_once_within_the_limit_of_descriptors(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(12)]
    for path in paths:
        path.write_bytes(path.name.encode() * 4000)
    files, before = PositionalFiles(limit=4), _descriptors()

    with ThreadPoolExecutor(8) as pool:
        for i, data in enumerate(pool.map(files.read, paths * 500, [0] * 6000, [20_000] * 6000)):
            assert data == str(i % 12).encode() * 4000
    assert _descriptors() <= before + 4
    del files
    assert _descriptors() == before


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_open_files_stay_within_the_limit_and_are_not_pickled(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(10)]
    for path in paths:
        path.write_text(path.name)
    before = _descriptors()
    files = PositionalFiles(limit=3)
    for _ in range(2):
        assert [files.read(path, 0, 9).decode() for path in paths] == [path.name for path in paths]
        assert _descriptors() == before + 3
    copy = pickle.loads(pickle.dumps(files))
    assert _descriptors() == before + 3
    assert copy.read(paths[4], 0, 9) == b"4"
    del files, copy
    assert _descriptors() == before


def test_a_locked_folder_that_is_created_and_stays_empty_is_removed_with_its_parents(tmp_path: Path) -> None:
    with files.locked(tmp_path / "a" / "b", "movq train-vq"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with files.locked(tmp_path / "a" / "b", "movq train-vq"):
        (tmp_path / "a" / "kept").write_text("")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["kept"]
    (tmp_path / "mine").mkdir()
    with files.locked(tmp_path / "mine", "movq train-vq"):
        pass
    assert (tmp_path / "mine").is_dir()  # The user's folder stays, although it is empty.
