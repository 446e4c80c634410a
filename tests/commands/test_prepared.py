"""`movq prepare --check` and `--show`: no damage is missed, and the sheet shows what is stored."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from movq_cli import digests
from movq_cli.commands import prepared as command
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import FailureError

if TYPE_CHECKING:
    from tests.conftest import Movq


def errors(root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a check that must fail."""
    with pytest.raises(FailureError, match=rf"{root} is damaged.*manifest\.json.*movq prepare") as caught:
        command.check(root, workers=2, console=Console(quiet=True))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and f"{len(lines)} errors" in str(caught.value)
    assert all(line.startswith(f"warning: {root}") for line in lines)
    return lines


def rewrite(shard: Path, change: object) -> None:
    """Pack a shard anew with other members."""
    with zipfile.ZipFile(shard) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members = change(members)  # type: ignore[operator]
    with zipfile.ZipFile(shard, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with shard.open("r+b") as file:
        digests.append_to_zip(file)


def with_index(members: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    index = json.loads(members["dataset.json"])
    return {**members, "dataset.json": json.dumps({**index, **changes}).encode()}


def test_a_good_set_is_good_and_says_what_it_holds(prepared: PreparedSet, movq: Movq) -> None:
    done = movq("prepare", "--check", prepared.root)
    assert done.stdout.split("\t")[0] == str(prepared.root) and "48 train, 12 val" in done.stdout
    result = json.loads(movq("prepare", "--check", prepared.root, "--json").stdout)
    assert (result["train"], result["val"], result["hash"]) == (48, 12, prepared.manifest.hash)
    for bad in ("nowhere", "."):
        assert "no prepared set" in movq("prepare", "--check", bad, code=2).stderr
    assert "--check takes" in movq("prepare", "--check", prepared.root, "out", code=2).stderr


def test_every_flipped_byte_of_a_shard_is_noticed(
    prepared: PreparedSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shard = prepared.root / "val" / "00000.zip"
    data = shard.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(data), 60):
        bad = bytearray(data)
        bad[position] ^= 1
        shard.write_bytes(bad)
        assert errors(prepared.root, capsys), position
    shard.write_bytes(data)
    command.check(prepared.root, workers=1, console=Console(quiet=True))


def test_each_damaged_image_is_named_and_the_remedy_works(
    shapes: Path, prepared: PreparedSet, capsys: pytest.CaptureFixture[str], movq: Movq, tmp_path: Path
) -> None:
    shard = prepared.root / "train" / "00000.zip"
    whole = shard.read_bytes()
    bad = bytearray(whole)
    with zipfile.ZipFile(shard) as archive:
        damaged = archive.infolist()[3:5]
    for info in damaged:
        bad[info.header_offset + 200] ^= 255
    shard.write_bytes(bad)
    lines = errors(prepared.root, capsys)
    assert len(lines) == 2 and all(info.filename in line for info, line in zip(damaged, lines, strict=True))
    done = movq("prepare", "--check", prepared.root, code=1)
    assert done.stdout == "" and done.stderr.splitlines()[-1].startswith("error: ")
    shard.unlink()
    (prepared.root / "manifest.json").unlink()
    movq("prepare", shapes, prepared.root, "--size", "16", "--val", "12", "--background", "255,255,255")
    assert shard.read_bytes() == whole
    movq("prepare", "--check", prepared.root)


def test_what_checksums_cannot_tell_is_found(
    prepared: PreparedSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def found(change: object) -> str:
        root = shutil.copytree(prepared.root, tmp_path / "copy")
        rewrite(root / "train" / "00000.zip", change)
        lines = errors(root, capsys)
        shutil.rmtree(root)
        return "\n".join(lines)

    first = "00000/img00000000.png"
    other = tmp_path / "other.png"
    Image.new("RGB", (16, 30)).save(other)
    assert f"{first} has 16 x 30 pixels" in found(lambda members: {**members, first: other.read_bytes()})
    assert "not an image" in found(lambda members: {**members, first: b"text"})
    assert "48 images, which are not the 47" in found(lambda members: {k: v for k, v in members.items() if k != first})
    assert "0 labels for 48 images" in found(lambda members: with_index(members, labels=None))
    wrong = [[f"00000/img{number:08d}.png", 3] for number in range(48)]
    assert "has the label 3" in found(lambda members: with_index(members, labels=wrong))
    assert "cannot be read" in found(lambda members: {**members, "dataset.json": b"{}"})
    assert "1 rejected images in the shards, 0 in" in found(lambda members: with_index(members, rejects=[["a", "b"]]))
    # Repacked, nothing in it is wrong: it is only not the shard that was made.
    assert "hash" in found(lambda members: members)


def test_missing_shards_and_swapped_ones_are_found(prepared: PreparedSet, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = (prepared.root / split / "00000.zip" for split in ("train", "val"))
    kept = train.read_bytes()
    train.unlink()
    assert "No such file" in errors(prepared.root, capsys)[0]
    train.write_bytes(val.read_bytes())
    val.write_bytes(kept)
    assert "12 images in train, but 48 in the manifest" in errors(prepared.root, capsys)[0]


# The sheet


def test_the_sheet_shows_each_class_and_the_held_out_images(prepared: PreparedSet, movq: Movq, tmp_path: Path) -> None:
    assert movq("prepare", "--show", prepared.root).stdout.strip() == str(tmp_path / "data.png")
    sheet = np.asarray(Image.open(tmp_path / "data.png"))
    assert sheet.shape == (4 * (14 + 128 + 2), 8 * 130, 3)
    split = prepared.split("train")
    assert split.labels is not None
    for row in range(3):
        (members,) = np.nonzero(split.labels == row)
        for column, place in ((0, 0), (7, len(members) - 1)):
            pixels = split.pixels(int(members[place]))[:, 2:18]
            top, left = row * 144 + 14, column * 130
            tile = sheet[top : top + 128, left : left + 128]
            assert np.array_equal(tile, pixels.repeat(8, axis=0).repeat(8, axis=1))


def test_a_sheet_of_a_set_without_classes_is_written_to_the_given_path(
    shapes: Path, movq: Movq, tmp_path: Path
) -> None:
    movq("prepare", shapes, "out", "--no-labels", "--val", "1")
    assert movq("prepare", "--show", "out", "sheet.png").stdout == "sheet.png\n"
    assert Image.open(tmp_path / "sheet.png").height == 14 + 8 * 130 + 14 + 130
    assert "sheet.jpg" in movq("prepare", "--show", "out", "sheet.jpg", code=2).stderr
    assert "no prepared set" in movq("prepare", "--show", "nowhere", code=2).stderr
