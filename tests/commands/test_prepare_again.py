"""`movq prepare` for a set that exists: what is missing is made again with the same bytes, and every remedy works."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movq_cli.commands import prepare_plan, prepared
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError, FailureError

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_plan, "SHARD_IMAGES", 4)


@pytest.fixture
def request_(tmp_path: Path) -> PrepareRequest:
    """The request of a set with three shards and one rejected image, which has been made."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "x.png").write_bytes(b"no image")
    request = PrepareRequest(str(tmp_path / "in"), tmp_path / "out", val="3")
    prepare(request, QUIET)
    return request


def tree(root: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def times(root: Path) -> dict[str, int]:
    """Return the time of the last change of all files below a folder."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def flip(path: Path, position: int) -> None:
    """Change a byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("shard", [None, (0, 2), (1, 2)])
def test_a_removed_shard_alone_is_made_again(
    request_: PrepareRequest, has_manifest: bool, shard: tuple[int, int] | None
) -> None:
    out = request_.out
    made, before = tree(out), times(out)
    removed = {"train/00001.zip"} | (set() if has_manifest else {"manifest.json"})
    for name in removed:
        (out / name).unlink()
    if has_manifest:
        with pytest.raises(BadRequestError, match=r"00001\.zip cannot be read: No such file.*the same `movq prepare`"):
            PreparedSet.open(out)
    for job in [shard] if shard is None or has_manifest else [(0, 2), (1, 2)]:
        prepare(PrepareRequest(request_.source, out, val="3", shard=job), QUIET)
    assert tree(out) == made
    changed = {name for name, time in times(out).items() if time != before[name]}
    assert changed == removed | (set() if has_manifest else {"rejects.jsonl"})


@pytest.mark.parametrize("damage", ["flip in an image", "truncate", "empty", "other content"])
def test_a_damaged_shard_of_a_finished_set_is_made_again(request_: PrepareRequest, damage: str) -> None:
    made, path = tree(request_.out), request_.out / "train" / "00000.zip"
    if damage == "flip in an image":
        flip(path, 100)
    else:
        size = {"truncate": len(path.read_bytes()) // 2, "empty": 0, "other content": 0}[damage]
        path.write_bytes(path.read_bytes()[:size] + (b"other" if damage == "other content" else b""))
    with pytest.raises(FailureError, match="Remove the shards that are named"):
        prepared.check(request_.out, workers=1, console=QUIET)
    prepare(request_, QUIET)
    assert tree(request_.out) == made


def test_the_remedy_of_a_check_works(request_: PrepareRequest) -> None:
    made = tree(request_.out)
    flip(request_.out / "val" / "00000.zip", 100)
    with pytest.raises(FailureError, match=r"Remove the shards that are named and .*manifest.json, and run the same"):
        prepared.check(request_.out, workers=1, console=QUIET)
    for name in ("val/00000.zip", "manifest.json"):
        (request_.out / name).unlink()
    prepare(request_, QUIET)
    prepared.check(request_.out, workers=1, console=QUIET)
    assert tree(request_.out) == made


@pytest.mark.parametrize("name", ["manifest.json", "rejects.jsonl"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
def test_a_removed_or_damaged_list_or_manifest_is_written_again(
    request_: PrepareRequest, name: str, content: bytes | None
) -> None:
    made, path = tree(request_.out), request_.out / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    prepare(request_, QUIET)
    assert tree(request_.out) == made


def test_a_damaged_plan_is_refused_and_the_remedy_works(request_: PrepareRequest) -> None:
    made = tree(request_.out)
    (request_.out / "plan.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BadRequestError, match=r"other settings .*remove that one"):
        prepare(request_, QUIET)
    shutil.rmtree(request_.out)
    prepare(request_, QUIET)
    assert tree(request_.out) == made


def test_shards_of_another_source_are_refused_and_the_remedy_works(request_: PrepareRequest) -> None:
    Image.new("RGB", (9, 9)).save(Path(request_.source) / "0.png")
    for path in request_.out.glob("*/*.zip"):
        path.unlink()
    with pytest.raises(FailureError, match=r"not those of its manifest.json.*If the source has changed, remove"):
        prepare(request_, QUIET)
    shutil.rmtree(request_.out)
    prepare(request_, QUIET)
    prepared.check(request_.out, workers=1, console=QUIET)


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("shard", [None, (0, 1)])
def test_what_killed_jobs_have_left_is_removed_at_the_end(
    request_: PrepareRequest, is_finished: bool, shard: tuple[int, int] | None
) -> None:
    out, made = request_.out, tree(request_.out)
    if not is_finished:
        for path in [out / "manifest.json", out / "plan.json", *out.glob("train/*.zip"), *out.glob("val/*.zip")]:
            path.unlink()
        (out / "rejects.jsonl").unlink()
        shutil.rmtree(out / "val")
        shutil.rmtree(out / "train")
    # These are all temporary files, in the order in which a job writes them.
    (out / "plan.json.0123").write_bytes(made["plan.json"])
    (out / "plan.json.0123.partial").write_bytes(b"{")
    (out / "plan.json.partial").write_bytes(b"{")
    if is_finished:
        for name in ("train/00000.zip.0123.partial", "train/00000.zip.partial", "val/00000.zip.0123.partial"):
            (out / name).write_bytes(b"PK")
        (out / "manifest.json.0123.partial").write_bytes(b"{")
        (out / "rejects.jsonl.0123.partial").write_bytes(b"{")
    prepare(PrepareRequest(request_.source, out, val="3", shard=shard), QUIET)
    assert tree(out) == made


def test_a_job_whose_set_is_finished_while_it_writes_the_plan_succeeds(
    request_: PrepareRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = tree(request_.out), request_.out / "plan.json"
    plan = path.read_bytes()
    path.unlink()
    for other in request_.out.rglob("*"):
        if other.is_file():
            other.unlink()
    for folder in ("train", "val"):
        (request_.out / folder).rmdir()

    def link(own: Path, target: Path) -> None:
        own.unlink()  # by the other job, which has just finished
        target.write_bytes(plan)
        raise FileNotFoundError(2, "No such file or directory", str(own))

    monkeypatch.setattr("os.link", link)
    prepare(PrepareRequest(request_.source, request_.out, val="3", shard=(0, 1)), QUIET)
    assert tree(request_.out) == made
