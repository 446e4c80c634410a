"""`movq check` finds every damaged file of a run, a prepared set, a cache and samples, and its remedies work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from movq_cli import digested_lines
from movq_cli.commands.check import check
from movq_cli.console import Console
from movq_cli.data import tuned_settings
from movq_cli.errors import BadRequestError, FailureError
from tests.conftest import Movq, run_movq

WITHOUT_DIGEST = {"settings.yaml", "log.jsonl", "rejects.jsonl", "plan.json", "tiny.yaml"}
"""Files that are only written, that a person may edit, or that are compared with what the command would write."""


@pytest.fixture(scope="module")
def everything(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared set, runs of both stages, caches, and samples in two forms; it must not be changed."""
    folder = tmp_path_factory.mktemp("everything") / "all"
    shutil.copytree(trained_once, folder)
    shutil.rmtree(folder / "pictures")
    for out in ("samples", "samples.zip"):
        run_movq(folder, "sample", out, "--n", "3", "--run", "runs/tiny-prior")
    return folder


@pytest.fixture
def copy(everything: Path, tmp_path: Path) -> Path:
    return shutil.copytree(everything, tmp_path / "all")


def files_with_digest(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in WITHOUT_DIGEST and not {"pictures", "tensorboard"} & set(path.parts)
    )


def errors(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Check a path, and return the errors that are found."""
    try:
        check(path, workers=2, console=Console(as_json=True, quiet=True))
    except FailureError:
        found: list[str] = json.loads(capsys.readouterr().out)["errors"]
        assert found
        return found
    assert not json.loads(capsys.readouterr().out)["errors"]
    return []


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped bit": lambda data: data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 4]) + data[len(data) // 3 + 1 :],
    "truncated by one byte": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "appended": lambda data: data + b"\0",
    "other content": lambda data: b"{}",
}


def test_undamaged_folders_and_files_have_no_errors(everything: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert errors(everything, capsys) == []
    for name in ("data", "runs", "runs/tiny-vq", "runs/tiny-vq/tokens", "samples", "samples.zip"):
        assert errors(everything / name, capsys) == []
    assert errors(everything / "runs/tiny-prior/prior.safetensors", capsys) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damaged_file_is_named(copy: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = files_with_digest(copy)
    assert {path.suffix for path in files} >= {".json", ".safetensors", ".pt", ".npy", ".zip", ".png"}
    for path in files:
        content = path.read_bytes()
        path.write_bytes(DAMAGES[damage](content))
        found = errors(copy, capsys)
        assert any(path.name in error for error in found), (path, found)
        assert all("\n" not in error for error in found)
        path.write_bytes(content)
    assert errors(copy, capsys) == []


def test_damaged_lines_of_a_log_and_of_a_search_are_named_and_can_be_removed(
    copy: Path, movq: Movq, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy / "runs/tiny-vq"
    log, journal = run / "log.jsonl", run / tuned_settings.SEARCH / tuned_settings.JOURNAL
    journal.parent.mkdir()
    journal.write_bytes(digested_lines.encode({"op_code": 0}))
    assert errors(run, capsys) == []
    journal.write_bytes(journal.read_bytes().replace(b"0", b"1", 1))
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], lines[1].replace(b'"step": ', b'"step": 1', 1), *lines[2:]]))
    of_journal, of_log = errors(run, capsys)
    assert of_journal.endswith(f"{journal} is damaged in line 1. {tuned_settings.JOURNAL_REMEDY}")
    assert f"{log} is damaged in line 2. No command can make it again. Remove these lines" in of_log
    for words in (["doctor", run], ["report", run, copy / "page.html"]):
        said = " ".join(movq(*words).stderr.split())
        assert f"warning: {log} has 1 damaged lines, which are left out. Remove them: 2." in said
    journal.unlink()
    log.write_bytes(b"".join([lines[0], *lines[2:]]))
    assert errors(run, capsys) == []


def test_a_missing_file_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("codes.npy", "labels.npy", "checkpoint.pt", "000001.png", "00000.zip"):
        (path, *_) = sorted(copy.rglob(name))
        content = path.read_bytes()
        path.unlink()
        assert any(name in error for error in errors(copy, capsys)), name
        path.write_bytes(content)


def test_a_shard_and_an_image_of_another_set_are_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(copy / "data/val/00000.zip", copy / "data/train/00000.zip")
    shutil.copy(copy / "samples/000000.png", copy / "samples/000001.png")
    found = errors(copy, capsys)
    assert any("000001.png" in error for error in found)
    assert any(str(copy / "data") in error for error in found)


def test_a_folder_with_nothing_to_check_is_a_bad_request(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for path in (tmp_path, tmp_path / "none", tmp_path / "a.txt"):
        with pytest.raises(BadRequestError, match=str(path)):
            check(path, workers=1, console=Console(quiet=True))


@pytest.mark.processes
@pytest.mark.slow
def test_the_command_ends_with_1_and_names_the_remedy_which_works(copy: Path, movq: Movq) -> None:
    image = copy / "samples" / "000001.png"
    content = image.read_bytes()
    image.write_bytes(content[:-20])
    done = movq("check", copy, code=1)
    assert done.stdout == f"{copy}\t{files_of(done.stdout)} files: 1 errors\n"
    assert f"{image} is missing or damaged. Run `movq sample` again with the same options" in done.stderr
    run_movq(copy, "sample", "samples", "--n", "3", "--run", "runs/tiny-prior")
    assert image.read_bytes() == content
    assert movq("check", copy).stdout.endswith("no errors\n")


def files_of(line: str) -> int:
    return int(line.split("\t")[1].split(maxsplit=1)[0])


def test_a_changed_digit_in_a_result_and_a_changed_code_are_found(copy: Path, tmp_path: Path, movq: Movq) -> None:
    result, codes = tmp_path / "result.json", tmp_path / "codes" / "000000.npy"
    movq("reconstruct", copy / "samples", "again", "--run", copy / "runs/tiny-vq", "--codes", "codes")
    movq("evaluate", "--psnr", copy / "samples", "again", "--crop", "16", "--out", result)
    assert json.loads(result.read_text())["digest"].startswith("xxh3-128:")
    assert "digest" not in movq("evaluate", "--table", result, "--json").stdout
    result.write_text(result.read_text().replace('"psnr": ', '"psnr": 1', 1))
    assert f"{result} is damaged" in movq("evaluate", "--table", result, code=2).stderr
    assert np.load(codes).shape == (8, 8, 4) == np.load(codes, mmap_mode="r").shape
    movq("reconstruct", "codes", "decoded", "--run", copy / "runs/tiny-vq")
    changed = np.load(codes)
    changed[0, 0, 0] ^= 1
    content = codes.read_bytes()
    codes.write_bytes(content.replace(np.load(codes).tobytes(), changed.tobytes()))
    assert (
        "000000.npy is damaged" in movq("reconstruct", "codes", "other", "--run", copy / "runs/tiny-vq", code=2).stderr
    )
    np.save(codes, changed)  # Another program has written it.
    movq("reconstruct", "codes", "other", "--run", copy / "runs/tiny-vq")
