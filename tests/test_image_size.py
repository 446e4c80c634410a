"""The size of images in settings, options and crops: a square is one number everywhere, a rectangle is two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from movq_cli import presets
from movq_cli.cli.options import image_size
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.commands.training import open_images
from movq_cli.console import Console
from movq_cli.data import loader, views
from movq_cli.data.images import BadImageError, center_crop, covering_size, resize_to_cover
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import cautions
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.image_size import ImageSize
from movq_cli.settings import Preset, TokenizerSettings, ViewSettings
from tests.conftest import TINY, Movq

SIDES = st.integers(1, 64)
TINY_VQ = Preset.model_validate(TINY).vq.model_dump()


@given(SIDES, SIDES)
@settings(deadline=None)
def test_a_resolution_survives_json_and_yaml_and_a_square_is_one_number(height: int, width: int) -> None:
    values = {"multipliers": (1, 1, 1), "initial_feature": "quantized", "attention_resolutions": ()}
    made = TokenizerSettings.model_validate({**values, "resolution": [4 * height, 4 * width]})
    expected = 4 * height if height == width else (4 * height, 4 * width)
    assert made.resolution == expected
    assert json.loads(made.model_dump_json())["resolution"] == (expected if height == width else list(made.image_size))
    assert TokenizerSettings.model_validate_json(made.model_dump_json()) == made
    assert TokenizerSettings.model_validate(made.model_dump(mode="json")) == made
    assert made.code_shape.size == (height, width, made.chunks)
    if height == width:
        square = TokenizerSettings.model_validate({**values, "resolution": 4 * height})
        assert square.model_dump_json() == made.model_dump_json()


@given(SIDES, SIDES, st.integers(1, 6))
@settings(deadline=None)
def test_a_side_that_is_not_a_multiple_of_the_factor_is_refused(height: int, width: int, levels: int) -> None:
    values: dict[str, Any] = {"multipliers": (1,) * levels, "initial_feature": "quantized", "attention_resolutions": ()}
    values |= {"resolution": (height, width), "modulation": None}
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        with pytest.raises(ValidationError, match=f"of the downsampling factor {factor}"):
            TokenizerSettings.model_validate(values)
    else:
        assert TokenizerSettings.model_validate(values).code_shape.positions == height * width // factor**2


@pytest.mark.parametrize("value", ["[256]", "[16, 32, 48]", "wide", "0", "[0, 16]", "[16, 100000]", "16x32", "null"])
def test_what_is_no_size_is_refused_in_one_line_that_shows_both_forms(value: str) -> None:
    with pytest.raises(BadRequestError) as error:
        presets.load("ffhq", [f"vq.resolution={value}"])
    assert "vq.resolution: give the side of a square (256) or height and width ([192, 256])" in str(error.value)
    assert "more)" not in str(error.value)


def tokenizer(**changes: Any) -> TokenizerSettings:
    return TokenizerSettings.model_validate({**TINY_VQ, **changes})


def test_the_shorter_side_decides_where_attention_is() -> None:
    assert tokenizer().attention_levels == (1,)
    for resolution in ((16, 32), (32, 16)):
        assert tokenizer(resolution=resolution).attention_levels == (1,)
    assert tokenizer(resolution=(16, 32), attention_resolutions=[16]).attention_levels == (0,)
    assert tokenizer(resolution=24).attention_levels == ()


def test_a_rectangle_without_the_attention_that_is_set_is_refused_and_the_named_sides_work() -> None:
    with pytest.raises(ValidationError, match=r"these sides are \[24, 12\]; \[\] is no attention"):
        tokenizer(resolution=(32, 24))
    assert tokenizer(resolution=(32, 24), attention_resolutions=[12]).attention_levels == (1,)
    assert tokenizer(resolution=(32, 24), attention_resolutions=[]).attention_levels == ()


@given(SIDES, SIDES)
@settings(deadline=None)
def test_an_option_reads_what_a_message_writes(height: int, width: int) -> None:
    size = ImageSize(height, width)
    assert image_size(str(size), "--size", 1) == size
    assert ImageSize.of(size.resolution) == size


@pytest.mark.parametrize(
    "text", ["", "x", "16x", "x16", "16*32", "-16", "16.5", "1x2x3", "[16, 32]", "²x16", "9" * 400]
)
def test_an_option_that_is_no_size_is_refused_with_examples_that_are_sizes(text: str) -> None:
    with pytest.raises(BadRequestError, match="--size 256, --size 192x256"):
        image_size(text, "--size", 8)
    assert image_size("192x256", "--size", 8) == ImageSize(192, 256)
    assert image_size("192X256", "--size", 8) == ImageSize(192, 256)


@pytest.mark.parametrize("text", ["7", "7x32", "32x7", "20000", "16x20000"])
def test_an_option_with_a_side_out_of_bounds_is_refused(text: str) -> None:
    with pytest.raises(BadRequestError, match="not within 8 and 16384 pixels a side"):
        image_size(text, "--size", 8)


@given(SIDES, SIDES, SIDES, SIDES)
@settings(deadline=None)
def test_a_crop_covers_the_image_in_one_direction_completely(height: int, width: int, to_h: int, to_w: int) -> None:
    image = Image.new("RGB", (width, height))
    size = ImageSize(to_h, to_w)
    resized = resize_to_cover(image, size, upscale=True)
    assert resized.size == covering_size(ImageSize(height, width), size)[::-1]
    assert resized.height == to_h or resized.width == to_w
    assert size.fits_into(ImageSize(resized.height, resized.width))
    assert center_crop(resized, size).size == (to_w, to_h)
    assert (resized is image) == (resized.size == image.size)
    if to_h <= height and to_w <= width:
        assert resize_to_cover(image, size, upscale=False).size == resized.size
    else:
        with pytest.raises(BadImageError, match=f"{width} x {height} pixels, "):
            resize_to_cover(image, size, upscale=False)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 3000))
@settings(deadline=None)
def test_a_crop_always_fits_into_the_size_that_covers_it(height: int, width: int, to_h: int, to_w: int) -> None:
    crop = ImageSize(to_h, to_w)
    assert crop.fits_into(covering_size(ImageSize(height, width), crop))


def test_the_views_of_a_rectangle_are_its_corners_and_its_centre() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    found = views.of_image(image, (16, 32), ViewSettings(scales=(1.25,), mirror=True))
    assert found.shape == (10, 3, 16, 32)
    for view, (top, left) in zip(found, [(0, 0), (0, 8), (4, 0), (4, 8), (2, 4)], strict=False):
        assert np.array_equal(view.transpose(1, 2, 0), image[top : top + 16, left : left + 32])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with one picture that is 40 x 30 pixels, and one that is 30 x 40, each four times."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        shape = (30, 40, 3) if number % 2 else (40, 30, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def prepared(pictures: Path, out: Path, preprocessing: Preprocessing) -> PreparedSet:
    prepare(PrepareRequest(str(pictures), out, preprocessing, val="2"), Console(quiet=True))
    return PreparedSet.open(out)


def test_crops_of_a_mixed_set_are_compared_with_its_smallest_height_and_width(pictures: Path, tmp_path: Path) -> None:
    images = prepared(pictures, tmp_path / "data", Preprocessing(size=30))
    assert images.smallest_size(ImageSize(16, 40)) == (30, 30)
    loader.check_size(images, tokenizer(resolution=(16, 30)))
    for resolution in ((16, 40), (40, 16)):
        with pytest.raises(BadRequestError, match=r"only 30 pixels high or 30 pixels wide.*vq\.resolution=30\."):
            loader.check_size(images, tokenizer(resolution=resolution))
    loader.check_size(images, tokenizer(resolution=30))


def test_a_set_of_one_shape_is_as_large_as_its_images(tmp_path: Path, pictures: Path) -> None:
    for path in pictures.glob("*[02468].png"):
        path.unlink()
    images = prepared(pictures, tmp_path / "data", Preprocessing(size=30))
    assert images.smallest_size(ImageSize(16, 40)) == (30, 40)
    loader.check_size(images, tokenizer(resolution=(30, 40), attention_resolutions=[15]))
    with pytest.raises(BadRequestError, match="only 30 pixels high or 40 pixels wide"):
        loader.check_size(images, tokenizer(resolution=(40, 30), attention_resolutions=[15]))


def test_random_crops_of_rectangles_are_parts_of_the_image(pictures: Path, tmp_path: Path) -> None:
    split = prepared(pictures, tmp_path / "data", Preprocessing(size=30)).split("train")
    crops = loader.Crops(split, (12, 24), random=True, flip=False, seed=0)
    batch = crops.batch([(epoch, index) for epoch in range(20) for index in range(len(split))])
    assert batch.shape == (20 * len(split), 3, 12, 24)
    windows = np.lib.stride_tricks.sliding_window_view(split.pixels(0), (12, 24), (0, 1))
    for crop in batch[:: len(split)].numpy():
        assert (windows == crop).all((2, 3, 4)).any()


def test_training_on_small_crops_of_a_set_of_rectangles_is_warned_of(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(pictures, tmp_path / "data", Preprocessing(size=(24, 32), upscale=True))
    for resolution, is_warned in (((16, 32), False), ((16, 24), True), ((24, 32), False)):
        values = {**TINY, "vq": {**TINY_VQ, "resolution": resolution, "attention_resolutions": []}}
        open_images(Preset.model_validate({**values, "data": {"path": str(tmp_path / "data")}}), "tiny", Console())
        shown = " ".join(capsys.readouterr().err.split())
        assert ("prepare them with --size 16x24" in shown) == is_warned
        assert ("24 pixels of height and 32 of width" in shown) == is_warned


def test_a_cropped_set_is_written_as_before_unless_it_is_a_rectangle(
    pictures: Path, tmp_path: Path, movq: Movq
) -> None:
    base = ["prepare", pictures, "--workers", "1", "--val", "2"]
    movq(*base[:2], "a", "--size", "30", "--square", *base[2:])
    movq(*base[:2], "b", "--size", "30x30", *base[2:])
    movq(*base[:2], "c", "--size", "30x24", *base[2:])
    square, same, tall = ((tmp_path / name / "manifest.json").read_bytes() for name in "abc")
    assert square == same
    assert (json.loads(square)["size"], json.loads(square)["square"]) == (30, True)
    assert (json.loads(tall)["size"], json.loads(tall)["square"]) == ([30, 24], False)
    assert PreparedSet.open(tmp_path / "c").split("train").pixels(0).shape == (30, 24, 3)
    error = movq(*base[:2], "d", "--size", "30x24", "--square", *base[2:], code=2).stderr
    assert error == "error: --square cuts out squares, but --size 30x24 is none. Leave --square out.\n"
    assert not (tmp_path / "d").exists()


def test_the_images_of_a_comparison_are_cropped_to_rectangles(pictures: Path) -> None:
    images = ImageSet("real", str(pictures), "val", crop=(15, 20), console=Console(quiet=True))
    found = [image for _, image in images.read(range(8)) if image is not None]
    assert {tuple(image.shape) for image in found} == {(3, 15, 20)}
    assert images.describe()["crop"] == {"height": 15, "width": 20, "filter": "lanczos"}
    (line,) = cautions.after([images])
    assert "8 of 8 real images were resized here to 15x20 pixels (height x width)" in line
    hashes = {
        ImageSet("real", str(pictures), "val", crop=crop, console=Console(quiet=True)).content_hash
        for crop in ((15, 20), (20, 15), 15, None)
    }
    assert len(hashes) == 4
