"""HEIC, JPEG XL and AVIF images are read if Pillow or a plugin can; otherwise they are named as what they are."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.console import Console
from movq_cli.data import images
from movq_cli.data.images import BadImageError, decode
from movq_cli.errors import BadRequestError
from movq_cli.sources.open import open_source
from tests.sources.files import fill

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
JXL = b"\xff\x0a" + bytes(100)


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the plugins be missing, whether they are installed or not."""
    monkeypatch.setattr(images, "_PLUGINS", {})
    _forget()
    yield
    _forget()


def _forget() -> None:
    images.image_suffixes.cache_clear()
    images._formats.cache_clear()


def test_files_of_formats_without_a_plugin_are_counted_and_the_extra_is_named(
    tmp_path: Path, no_plugins: None, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "in", "cat/1.jpg", "dog/2.jpg")
    for name in ("cat/3.HEIC", "bird/4.heic", "cat/5.jxl"):
        (fill(tmp_path / "in", name) / name).write_bytes(HEIC)
    prepare(PrepareRequest(str(tmp_path / "in"), tmp_path / "out", val="1"), Console())
    warned = capsys.readouterr().err
    assert "3 files that are no readable images were left out: 2 .heic, 1 .jxl" in warned
    assert "`pip install 'movq[formats]'` reads .heic .jxl" in warned
    with pytest.raises(BadRequestError, match=r"it holds 1 \.heic .*movq\[formats\]"):
        open_source(str(tmp_path / "in" / "bird"))
    with pytest.raises(BadRequestError, match=r"4\.heic is neither an image.*movq\[formats\]"):
        open_source(str(tmp_path / "in" / "bird" / "4.heic"))


@pytest.mark.parametrize(("data", "name"), [(HEIC, "HEIC"), (JXL, "JPEG XL")])
def test_an_image_under_the_suffix_of_another_format_is_named_as_what_it_is(
    no_plugins: None, data: bytes, name: str
) -> None:
    with pytest.raises(BadImageError, match=rf"a {name} image, which `pip install 'movq\[formats\]'` reads"):
        decode(data)


@pytest.mark.parametrize(
    ("module", "form", "suffix"),
    [("pillow_heif", "HEIF", ".heic"), ("pillow_jxl", "JXL", ".jxl"), ("", "AVIF", ".avif")],
)
@pytest.mark.parametrize("turn", [1, 6])
def test_an_image_is_read_and_turned_upright_once(
    tmp_path: Path, module: str, form: str, suffix: str, turn: int
) -> None:
    if module:
        pytest.importorskip(module)
    elif not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    decode(_encoded("PNG", turn))  # registers the plugins
    image = decode(_encoded(form, turn))
    assert image.size == ((24, 40) if turn == 6 else (40, 24))
    expected = np.asarray(decode(_encoded("PNG", turn))).astype(int)
    assert abs(np.asarray(image) - expected).mean() < 8
    (tmp_path / f"1{suffix.upper()}").write_bytes(_encoded(form, turn))
    assert len(open_source(str(tmp_path))) == 1
    with pytest.raises(BadImageError):
        decode(_encoded(form, turn)[:-200])


def _encoded(form: str, turn: int) -> bytes:
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:12, :20] = 255
    pixels[12:, :, 0] = 200
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, exif=exif.tobytes())
    return buffer.getvalue()
