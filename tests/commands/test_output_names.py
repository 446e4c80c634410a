"""`movq reconstruct` writes one file for each image, whatever the images, folders and pictures are called."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from movq_cli.evaluation.paired import short_names

if TYPE_CHECKING:
    from tests.conftest import Movq

PARTS = st.sampled_from(["a", "a-0", "a-0-1", "a.png", "a-0.png", "b.jpg", "b-1.png", "0", "-0"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), min_size=1, max_size=8, unique=True)
SUFFIXES = st.lists(st.sampled_from([".png", ".jpg", ".jpg.png"]), min_size=8, max_size=8)


@given(NAMES, SUFFIXES, st.integers(1, 3))
def test_the_fillings_of_two_images_have_different_names(names: list[str], suffixes: list[str], samples: int) -> None:
    images = list(dict.fromkeys(name + suffix for name, suffix in zip(names, suffixes, strict=False)))
    endings = [".png"] if samples == 1 else [f"-{number}.png" for number in range(samples)]
    outputs = [name + ending for name in short_names(images, endings) for ending in endings]
    assert len(set(outputs)) == len(images) * samples


def image(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, *names: str) -> None:
    """Write an image under each name into an empty folder `in`."""
    for value, name in enumerate(names):
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in" / name).write_bytes(image(40 * value))


def outputs(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_names_like_those_of_fillings_and_folders_like_files(movq: Movq, trained: Path) -> None:
    fill = ("reconstruct", "in", "out", "--mask-ratio", "0.5")
    write(trained, "a.png", "a-0.png", "b.jpg", "b-1.png/0.jpg")
    movq(*fill, "--samples", "2")
    expected = ["a-0-0.png", "a-0-1.png", "a-0.png", "a-1.png", "b-1.png/0-0.png", "b-1.png/0-1.png"]
    assert outputs(trained / "out") == sorted([*expected, "b.jpg-0.png", "b.jpg-1.png"])
    movq("reconstruct", "in", "plain", "--codes", "codes")
    assert outputs(trained / "plain") == ["a-0.png", "a.png", "b-1.png/0.png", "b.png"]
    assert outputs(trained / "codes") == ["a-0.npy", "a.npy", "b-1.png/0.npy", "b.npy"]


@pytest.mark.slow
def test_what_would_collide_is_refused_before_the_work_and_the_way_out_works(movq: Movq, trained: Path) -> None:
    write(trained, "a.jpg", "a.png/0.jpg", "a.jpg.png/0.jpg")
    for options in ([], ["--mask-ratio", "0.5"]):
        said = movq("reconstruct", "in", "out", *options, code=2).stderr
        assert "out/a.jpg.png would be the output of an image, and the folder of the output of another one" in said
        assert "Rename one of them in the source" in said and not (trained / "out").exists()
    (trained / "in/a.jpg").rename(trained / "in/b.jpg")
    movq("reconstruct", "in", "out")
    assert outputs(trained / "out") == ["a.jpg.png/0.png", "a.png/0.png", "b.png"]
    for out, options in (("one", ["--grid"]), ("two", ["--mask-ratio", "0.5", "--figure"])):
        said = movq("reconstruct", "in", out, *options, f"{out}/b.png", code=2).stderr
        assert f"the picture {out}/b.png would have the name of the output of an image. Choose another path" in said
        assert not (trained / out).exists()
        movq("reconstruct", "in", out, *options, f"{out}/grid.png")
        assert outputs(trained / out) == ["a.jpg.png/0.png", "a.png/0.png", "b.png", "grid.png"]


@pytest.mark.slow
def test_a_grid_of_samples_is_none_of_the_samples(movq: Movq, trained: Path) -> None:
    said = movq("sample", "samples", "-n", "2", "--grid", "samples/000001.png", code=2).stderr
    assert "the picture samples/000001.png would have the name of the output of an image" in said
    assert not (trained / "samples").exists()
    movq("sample", "samples", "-n", "2", "--grid", "samples/000002.png")
    assert outputs(trained / "samples") == ["000000.png", "000001.png", "000002.png", "manifest.json"]


@pytest.mark.slow
def test_code_maps_that_would_collide_are_refused_and_animations_are_counted(movq: Movq, trained: Path) -> None:
    write(trained, "a.jpg")
    Image.new("RGB", (16, 16)).save(
        trained / "in" / "b.gif", save_all=True, append_images=[Image.new("RGB", (16, 16), (9, 99, 199))]
    )
    for options in (["--codes", "codes"], ["--mask-ratio", "0.5"]):
        said = movq("reconstruct", "in", "out", *options).stderr
        assert said.count("1 files hold several pages or frames, such as b.gif") == 1
    (trained / "codes/a.png").mkdir()
    (trained / "codes/b.npy").rename(trained / "codes/a.png/b.npy")
    said = movq("reconstruct", "codes", "back", code=2).stderr
    assert "back/a.png would be the output of an image, and the folder" in said and not (trained / "back").exists()
    (trained / "codes/a.npy").rename(trained / "codes/c.npy")
    movq("reconstruct", "codes", "back")
    assert outputs(trained / "back") == ["a.png/b.png", "c.png"]
