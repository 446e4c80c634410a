"""Views of an image: the requested crops, from the stored pixels, and their mirror images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import ten_crop

from movq_cli.data import views
from movq_cli.settings import ViewSettings

TEN_AT_TWO_SCALES = ViewSettings(mirror=True, scales=(1.1, 1.05))


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng((height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_images(found: object) -> list[bytes]:
    return [view.transpose(1, 2, 0).tobytes() for view in found]  # type: ignore[attr-defined]


sides = st.integers(0, 30).map(lambda spare: 20 + spare)
settings = st.builds(
    ViewSettings, mirror=st.booleans(), scales=st.lists(st.sampled_from([1.05, 1.1, 1.5, 2.0]), max_size=2).map(tuple)
)


@given(sides, sides, settings)
def test_there_are_as_many_as_the_settings_say_and_the_mirror_images_come_last(
    height: int, width: int, requested: ViewSettings
) -> None:
    found = views.of_image(picture(height, width), 20, requested)
    assert found.shape == (requested.count, 3, 20, 20)
    if requested.mirror:
        plain, mirrored = np.split(found, 2)
        assert np.array_equal(plain[..., ::-1], mirrored)


@given(sides, sides)
def test_without_scales_it_is_the_centre_crop_alone(height: int, width: int) -> None:
    image = picture(height, width)
    top, left = (height - 20) // 2, (width - 20) // 2
    (view,) = views.of_image(image, 20, ViewSettings())
    assert np.array_equal(view.transpose(1, 2, 0), image[top : top + 20, left : left + 20])


@given(sides, sides)
def test_the_crops_of_a_scale_are_torchvisions_ten_of_the_central_square(height: int, width: int) -> None:
    image = picture(height, width)
    found = as_images(views.of_image(image, 20, ViewSettings(mirror=True, scales=(1.2,))))
    scale = 24 / min(height, width)
    whole = Image.fromarray(image)
    if min(height, width) != 24:
        whole = whole.resize((max(24, round(width * scale)), max(24, round(height * scale))), Image.Resampling.LANCZOS)
    left, top = (whole.width - 24) // 2, (whole.height - 24) // 2
    square = whole.crop((left, top, left + 24, top + 24))
    expected = [np.asarray(crop).tobytes() for crop in ten_crop(square, 20)]
    assert found[:5] == expected[:5]
    # torchvision mirrors the square before it cuts the corners: the same crops in another order.
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(("scale", "square"), [(1.1, 281), (1.05, 268)])
def test_a_prepared_image_of_the_presets_size_is_enlarged_once_for_each_scale(scale: float, square: int) -> None:
    image = picture(256, 300)
    found = as_images(views.of_image(image, 256, TEN_AT_TWO_SCALES))
    whole = Image.fromarray(image).resize((round(300 * square / 256), square), Image.Resampling.LANCZOS)
    left = (whole.width - square) // 2
    assert np.asarray(whole.crop((left, 0, left + 256, 256))).tobytes() in found


def test_twenty_views_of_one_image_differ() -> None:
    found = as_images(views.of_image(picture(256, 300), 256, TEN_AT_TWO_SCALES))
    assert len(set(found)) == TEN_AT_TWO_SCALES.count == 20


def test_scale_1_gives_both_ends_and_the_centre_of_the_longer_side() -> None:
    wide, high = picture(20, 31), picture(31, 20)
    found = views.of_image(wide, 20, ViewSettings(scales=(1,)))
    for view, left in zip(found, (0, 5, 11), strict=True):
        assert np.array_equal(view.transpose(1, 2, 0), wide[:, left : left + 20])
    found = views.of_image(high, 20, ViewSettings(scales=(1, 1.2), mirror=True))
    assert len(found) == ViewSettings(scales=(1, 1.2), mirror=True).count == 16
    for view, top in zip(found, (0, 5, 11), strict=False):
        assert np.array_equal(view.transpose(1, 2, 0), high[top : top + 20])
