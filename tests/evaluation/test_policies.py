"""What is said of two sets that were made or are decoded in different ways, by the content of their files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movq_cli.app import app
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import cautions, metrics
from movq_cli.evaluation.image_sets import ImageSet


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 12, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode if mode != "L" else None)


def said(*sides: ImageSet) -> list[str]:
    """Return the warnings about two sets once both have been hashed, as for FID."""
    lines = list(cautions.before(sides, []))
    for side in sides:
        assert side.content_hash
    return [*lines, *cautions.after(sides)]


def images(role: str, folder: Path, background: tuple[int, int, int] = (255, 255, 255)) -> ImageSet:
    return ImageSet(role, str(folder), "train", background=background, console=Console(quiet=True))


def write(folder: Path, formats: str) -> Path:
    """Write images whose content is JPEG or PNG by the letters J and P, all of them under the suffix .jpg."""
    folder.mkdir()
    for number, letter in enumerate(formats):
        with (folder / f"{number:02d}.jpg").open("wb") as file:
            noise(number).save(file, "JPEG" if letter == "J" else "PNG")
    return folder


@pytest.mark.parametrize(
    ("real", "fake", "warning"),
    [
        ("PPPP", "PPPP", None),
        ("JJJJ", "JJJJ", None),
        ("PPPPPPPPPPPP", "JPPPPPPPPPPP", None),  # one of twelve
        ("PJJJJJJJ", "PPPPPPPP", "the sides have different shares of JPEG images (real 87.5%, fake 0.0%)"),
        ("PPPP", "JJJJ", "only the fake images are JPEG"),
    ],
)
def test_jpeg_is_decided_by_the_content_of_all_images(
    tmp_path: Path, real: str, fake: str, warning: str | None
) -> None:
    lines = said(images("real", write(tmp_path / "real", real)), images("fake", write(tmp_path / "fake", fake)))
    assert lines == ([] if warning is None else [f"{warning}: the metrics measure its artefacts too"])


@pytest.fixture
def special(tmp_path: Path) -> Path:
    """A folder of images with an alpha channel, with an orientation in EXIF, and of 12 bits."""
    folder = tmp_path / "special"
    folder.mkdir()
    noise(0, "RGBA").save(folder / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(1).save(folder / "exif.png", exif=turned)
    deep = np.random.default_rng(2).integers(0, 4096, (16, 12)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    return folder


def prepared(source: Path, out: Path, **preprocessing: object) -> Path:
    request = PrepareRequest(str(source), out, Preprocessing(**preprocessing), val="1")  # type: ignore[arg-type]
    prepare(request, Console(quiet=True))
    return out


def test_policies_that_differ_are_said_if_an_image_is_concerned(special: Path, tmp_path: Path) -> None:
    raw, plain = images("fake", special), write(tmp_path / "plain", "PPP")
    own = prepared(special, tmp_path / "own", background=(0, 0, 0), orientation=False, white=4095)
    assert list(cautions.before([images("real", own), raw], [])) == [
        "the sides have different backgrounds behind transparent pixels (real 0,0,0, fake 255,255,255); "
        "--background 0,0,0 makes them equal",
        "images with an orientation in their EXIF data are turned on one side only (real as stored, fake upright)",
        "gray images of 16 bits have different values of white (real 4095, fake 65535)",
    ]
    usual = prepared(special, tmp_path / "usual")
    assert list(cautions.before([images("real", usual), raw], [])) == []
    assert list(cautions.before([images("real", own), images("fake", plain)], [])) == []
    both = list(cautions.before([images("real", own), images("fake", usual)], []))
    assert [line.partition(" (")[0] for line in both] == [
        "the sides have different backgrounds behind transparent pixels",
        "images with an orientation in their EXIF data are turned on one side only",
        "gray images of 16 bits have different values of white",
    ]


def test_the_background_that_a_caution_names_makes_the_pixels_equal(special: Path, tmp_path: Path) -> None:
    for name in ("exif.png", "deep.png"):
        (special / name).unlink()
    shutil.copy(special / "alpha.png", special / "beta.png")
    own = images("real", prepared(special, tmp_path / "own", background=(9, 8, 7)))
    same, other = images("fake", special, (9, 8, 7)), images("fake", special)
    assert list(cautions.before([own, same], [])) == []
    assert same.content_hash != other.content_hash
    (_, real), (_, fake), (_, white) = (next(side.read([0])) for side in (own, same, other))
    assert real is not None
    assert fake is not None
    assert white is not None
    assert real.equal(fake)
    assert not real.equal(white)


def test_a_background_without_effect_is_refused(special: Path, tmp_path: Path) -> None:
    own = prepared(special, tmp_path / "own")
    with pytest.raises(BadRequestError, match=r"--background has no effect: .*own had its transparent pixels"):
        app(
            ["evaluate", str(own), str(own), "--psnr", "--split", "train", "--background", "0,0,0"],
            standalone_mode=False,
        )


@pytest.mark.parametrize(("key", "number"), [("fid", 2048), ("isc", 5000), ("kid", 1000), ("prc", 5000)])
def test_every_metric_of_sets_warns_of_few_images(tmp_path: Path, key: str, number: int) -> None:
    sides = [images(role, write(tmp_path / role, "PP")) for role in ("real", "fake")]
    (metric,) = metrics.requested((key,))
    lines = list(metric.warnings(sides, reconstructed=False))
    assert [line.partition(":")[0] for line in lines] == [
        f"{side.role} has 2 images, fewer than {number}" for side in (sides if key != "isc" else sides[1:])
    ]


def test_twelve_bits_in_sixteen_are_said_and_the_option_makes_them_white(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    for number in range(3):
        values = np.full((16, 12), 4095 - number, np.uint16)
        Image.fromarray(values).save(folder / f"{number}.png")
    prepare(PrepareRequest(str(folder), tmp_path / "dark", val="1"), Console(quiet=True))
    warning = capsys.readouterr().err
    assert "gray images of 16 bits have values of up to 4095 only" in warning
    assert "If these are 12 bits, pass --white 4095" in warning
    bright = images("real", prepared(folder, tmp_path / "bright", white=4095))
    assert capsys.readouterr().err == ""
    brightest = max(int(image.max()) for _, image in bright.read(range(2)) if image is not None)
    assert brightest == 255


def test_values_above_white_are_white(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(np.array([[0, 2000, 65535]], np.uint16).repeat(3, 0)).save(folder / f"{number}.png")
    ((_, image),) = images("real", prepared(folder, tmp_path / "out", white=1000)).read([0])
    assert image is not None
    assert image[0, 0].tolist() == [0, 255, 255]
