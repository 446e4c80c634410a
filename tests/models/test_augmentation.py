"""Differentiable augmentation, against loops over pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from movq_cli.models.augmentation import AUGMENTATIONS, NUMBERS, augment


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 17, 24, dtype=torch.float64) * 2 - 1


@pytest.fixture
def numbers() -> Tensor:
    """Random numbers, with the smallest and the largest ones in two rows."""
    drawn = torch.rand(5, NUMBERS, dtype=torch.float64)
    drawn[0], drawn[1] = 0.0, 1 - 2.0**-24
    return drawn


def test_colors_change_in_brightness_then_in_saturation_then_in_contrast(images: Tensor, numbers: Tensor) -> None:
    found = augment(images, ("color",), numbers)
    for image, (brightness, saturation, contrast), result in zip(images, numbers[:, :3].tolist(), found, strict=True):
        bright = image + brightness - 0.5
        gray = (bright[0] + bright[1] + bright[2]) / 3
        saturated = torch.stack([gray + 2 * saturation * (channel - gray) for channel in bright])
        mean = saturated.sum() / saturated.numel()
        torch.testing.assert_close(result, mean + (0.5 + contrast) * (saturated - mean))


def test_a_translation_moves_whole_pixels_by_at_most_an_eighth(images: Tensor, numbers: Tensor) -> None:
    found = augment(images, ("translation",), numbers)
    shifts = []
    for image, row, result in zip(images, numbers.tolist(), found, strict=True):
        down, right = int(row[3] * 5) - 2, int(row[4] * 7) - 3  # 17 // 8 is 2, and 24 // 8 is 3.
        shifts.append((down, right))
        expected = torch.zeros_like(image)
        for y in range(17):
            for x in range(24):
                if 0 <= y - down < 17 and 0 <= x - right < 24:
                    expected[:, y, x] = image[:, y - down, x - right]
        assert torch.equal(result, expected)
    assert shifts[:2] == [(-2, -3), (2, 3)]


def test_a_cutout_is_a_rectangle_of_half_the_sides_with_its_center_in_the_image(
    images: Tensor, numbers: Tensor
) -> None:
    found = augment(images, ("cutout",), numbers)
    for image, row, result in zip(images, numbers.tolist(), found, strict=True):
        # 17 // 2 is 8 and 24 // 2 is 12: an even size has one more center than there are pixels.
        top, left = int(row[5] * 18) - 4, int(row[6] * 25) - 6
        expected = image.clone()
        expected[:, max(0, top) : max(0, top + 8), max(0, left) : max(0, left + 12)] = 0
        assert torch.equal(result, expected)
    # A quarter of the rectangle is in the image if its center is a corner.
    assert (found[0] == 0).any(0).sum() == 4 * 6
    assert (found[1] == 0).any(0).sum() == 4 * 6


def test_the_order_is_that_of_the_names_and_gradients_pass_through_all(images: Tensor, numbers: Tensor) -> None:
    kinds = tuple(AUGMENTATIONS)
    one_by_one = images
    for kind in kinds:
        one_by_one = augment(one_by_one, (kind,), numbers)
    assert torch.equal(augment(images, kinds, numbers), one_by_one)
    assert torch.equal(augment(images, (), numbers), images)
    small = images[:2, :, :4, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, kinds, numbers[2:4]), small)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, kinds, numbers[2:4]).square(), small)


def test_the_images_of_a_batch_are_augmented_apart(images: Tensor, numbers: Tensor) -> None:
    together = augment(images, tuple(AUGMENTATIONS), numbers)
    for index in range(len(images)):
        alone = augment(images[index : index + 1], tuple(AUGMENTATIONS), numbers[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone)
