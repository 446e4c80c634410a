"""A folder of samples from an earlier, larger request says that it has more images than requested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from movq_cli.console import Console
from movq_cli.data.sample_files import SampleFiles, SampleManifest, image_name


def sample_files(path: Path, n: int) -> SampleFiles:
    images = [{"file": image_name(index), "seed": index, "class": None} for index in range(n)]
    return SampleFiles(path, SampleManifest(settings={"seed": 0}, made_with={}, images=images))


def draw(path: Path, n: int) -> SampleFiles:
    """Write the missing images of a set of n."""
    target = sample_files(path, n)
    with target.locked():
        for index in target.begin(Console(quiet=True)):
            target.write_image(index, Image.new("RGB", (8, 8), (index, 0, 0)))
        target.finish([], Console(quiet=True))
    return target


def test_a_smaller_request_says_how_many_images_the_folder_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert draw(out, 6).listed == 6
    assert capsys.readouterr().err == ""
    assert draw(out, 3).listed == 6
    assert "is a set of 6 images, and 3 were requested; the others stay" in capsys.readouterr().err
    assert len(json.loads((out / "manifest.json").read_text())["images"]) == len(list(out.glob("*.png"))) == 6
    assert draw(tmp_path / "another", 3).listed == 3  # the remedy of the warning
    assert len(list((tmp_path / "another").glob("*.png"))) == 3
    assert capsys.readouterr().err == ""


def test_a_smaller_request_for_a_file_whose_images_are_not_packed_yet_packs_the_requested_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.npz"
    target = sample_files(out, 6)
    with target.locked():
        for index in target.begin(Console(quiet=True)):
            target.write_image(index, Image.new("RGB", (8, 8)))
    assert draw(out, 3).listed == 3
    assert len(json.loads((tmp_path / "out.npz.manifest.json").read_text())["images"]) == 3
    assert capsys.readouterr().err == ""
