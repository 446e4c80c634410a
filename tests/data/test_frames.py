"""Of files with several pages or frames the first is read, and a sentence counts them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.console import Console
from movq_cli.data import frames
from movq_cli.data.images import decode
from movq_cli.data.shards import PreparedSet
from tests.sources.files import picture, written

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
SUFFIXES = {"GIF": "gif", "TIFF": "tif", "WEBP": "webp", "PNG": "png"}


def animated(form: str, count: int) -> bytes:
    """Return a file of some pictures of one color each, the first one red."""
    first, *others = (Image.new("RGB", (16, 16), color) for color in COLORS[:count])
    options = {"lossless": True} if form == "WEBP" else {}
    buffer = io.BytesIO()
    first.save(buffer, form, save_all=True, append_images=others, **options)
    return buffer.getvalue()


def tiff_of(kinds: Sequence[int]) -> bytes:
    """Return a TIFF file with a page for each value of the tag that says what a page is."""
    buffer = io.BytesIO()
    with AppendingTiffWriter(buffer, new=True) as file:
        for number, kind in enumerate(kinds):
            page = Image.new("RGB", (16 >> number, 16 >> number), COLORS[number])
            page.save(file, "TIFF", tiffinfo={254: kind}, big_tiff=False)
            file.newFrame()
    return buffer.getvalue()


@pytest.mark.parametrize("form", SUFFIXES)
def test_a_file_of_several_pictures_is_recognized_and_its_first_one_is_read(form: str) -> None:
    assert frames.has_several(animated(form, 3)) and not frames.has_several(animated(form, 1))
    assert np.abs(np.asarray(decode(animated(form, 3))).astype(int) - COLORS[0]).max() <= 5


@pytest.mark.parametrize(
    ("kinds", "expected"), [([0, 0], True), ([0, 1, 1], False), ([0, 4], False), ([0, 1, 0], True)]
)
def test_smaller_copies_and_masks_in_a_tiff_are_no_pages(kinds: Sequence[int], expected: bool) -> None:
    with Image.open(io.BytesIO(tiff_of(kinds))) as image:
        assert getattr(image, "n_frames", 1) == len(kinds)
    assert frames.has_several(tiff_of(kinds)) is expected


def test_the_second_picture_of_a_telephone_is_no_frame() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert not frames.has_several(buffer.getvalue())


@pytest.mark.parametrize("make", [lambda form: animated(form, 3), lambda form: animated(form, 1)])
@pytest.mark.parametrize("form", SUFFIXES)
def test_a_damaged_file_is_no_error(form: str, make: Callable[[str], bytes]) -> None:
    data = make(form)
    for length in range(0, len(data), 7):
        assert frames.has_several(data[:length]) in {False, True}


def test_prepare_counts_the_files_and_what_it_advises_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{form.lower()}.{suffix}": animated(form, 3) for form, suffix in SUFFIXES.items()}
    single = {f"single/{name}.png": picture(number) for number, name in enumerate("abcd")}
    written(tmp_path / "in", {**files, **single})
    for workers, out in ((1, "one"), (2, "two")):
        prepare(PrepareRequest(str(tmp_path / "in"), tmp_path / out, val="2", workers=workers), Console(quiet=True))
        (line,) = capsys.readouterr().err.splitlines()
        assert "4 files hold several pages or frames, such as gif.gif: only the first of each was used. Save" in line
    assert sum(PreparedSet.open(tmp_path / "one").manifest.counts.values()) == 8
    prepare(PrepareRequest(str(tmp_path / "in"), tmp_path / "one", val="2"), Console(quiet=True))
    assert capsys.readouterr().err == ""  # Nothing was made.
    for name, data in files.items():
        with Image.open(io.BytesIO(data)) as image:
            for number in range(3):
                image.seek(number)
                image.convert("RGB").save(tmp_path / "in" / f"{name}-{number}.png")
        (tmp_path / "in" / name).unlink()
    prepare(PrepareRequest(str(tmp_path / "in"), tmp_path / "all", val="2"), Console(quiet=True))
    assert capsys.readouterr().err == ""
    assert sum(PreparedSet.open(tmp_path / "all").manifest.counts.values()) == 16
