"""The command `movq reconstruct` replaces none of its inputs, with and without a mask, and repeats its work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Movq


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_no_output_replaces_an_image_and_output_inside_the_source_is_not_read(movq: Movq, trained: Path) -> None:
    before = content(trained / "pictures")
    image = "pictures/bar/000.png"
    for arguments, says in (
        (["pictures", "pictures"], "pictures holds the images that are read"),
        ([image, "pictures/bar"], "pictures/bar holds the images that are read"),
        (["pictures", "pictures", "--mask-ratio", "0.5"], "pictures holds the images that are read"),
        (["pictures", "out", "--codes", "pictures/bar"], "pictures/bar holds the images that are read"),
        (["pictures", "out", "--grid", image], "is read, so that it cannot"),
        ([image, ".", "--mask-ratio", "0.5", "--figure", image], "is read, so that it cannot"),
    ):
        assert says in movq("reconstruct", *arguments, code=2).stderr
        assert content(trained / "pictures") == before
    for _ in range(2):
        movq("reconstruct", "pictures", "pictures/out", "--codes", "pictures/codes")
        after = content(trained / "pictures")
        assert {name: after[name] for name in before} == before
        assert sum(name.endswith(".png") for name in after) == 2 * len(before)
    left_out = movq("prepare", "pictures", "again", "--size", "16").stderr
    assert "output of movq was left out: codes/, out/" in left_out and f"{len(before)} images" in left_out
