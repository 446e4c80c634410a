"""The discriminator with GroupNorm or without a norm, and with blur-pools in place of strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from movq_cli.models.discriminator import BatchNorm, BlurPool, PatchDiscriminator
from movq_cli.training import cost
from movq_cli.training_settings import TrainVQSettings


@pytest.mark.parametrize(("height", "width"), [(5, 8), (6, 1), (2, 3)])
def test_a_blur_pool_is_every_second_value_of_the_blurred_map(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    found = BlurPool()(x)
    assert found.shape == (2, 3, (height + 1) // 2, (width + 1) // 2)
    for row in range(found.shape[2]):
        for column in range(found.shape[3]):
            total = torch.zeros(2, 3, dtype=torch.float64)
            for down, weight in ((-1, 1), (0, 2), (1, 1)):
                for right, other in ((-1, 1), (0, 2), (1, 1)):
                    y, z = 2 * row + down, 2 * column + right
                    if 0 <= y < height and 0 <= z < width:
                        total += weight * other / 16 * x[:, :, y, z]
            torch.testing.assert_close(found[:, :, row, column], total)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(32, 41), (47, 64)])
def test_the_blur_changes_neither_the_number_of_logits_nor_of_parameters(layers: int, height: int, width: int) -> None:
    with torch.device("meta"):
        strided, blurred = (PatchDiscriminator(2, layers, "group", blur=blur) for blur in (False, True))
        images = torch.empty(1, 3, height, width)
        assert blurred(images).shape == strided(images).shape
    shapes = [[parameter.shape for parameter in model.parameters()] for model in (strided, blurred)]
    assert shapes[0] == shapes[1]


def seen_by_the_middle(model: PatchDiscriminator) -> tuple[int, int, int]:
    """Return the side of the square that a logit sees, and the first and last row of it."""
    images = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = model(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    rows = (images.grad[0].abs().sum((0, 2)) > 0).nonzero()
    return len(rows), int(rows[0]), int(rows[-1])


def test_a_blurred_logit_is_centered_where_a_strided_one_is() -> None:
    torch.manual_seed(0)
    _, first, last = seen_by_the_middle(PatchDiscriminator(4, 2, "none"))
    size, blurred_first, blurred_last = seen_by_the_middle(PatchDiscriminator(4, 2, "none", blur=True))
    assert blurred_first + blurred_last == first + last
    assert size == 34 + 2 * (1 + 2)  # Each blur adds a pixel of its own map on both sides.


def test_a_pixel_shift_changes_the_mean_logit_less_with_the_blur() -> None:
    torch.manual_seed(0)
    changes = []
    noise = torch.randn(8, 3, 64, 64)
    images, shifted = noise[..., :-1], noise[..., 1:]
    for blur in (False, True):
        model = PatchDiscriminator(16, 2, "none", blur=blur)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        one, other = (model(part).mean((1, 2, 3)) for part in (images, shifted))
        changes.append(((one - other).std() / model(images).std()).item())
    assert changes[1] < 0.7 * changes[0]


@pytest.mark.parametrize(
    ("norm", "kind", "biases"),
    [("batch", BatchNorm, [1, 0, 0, 0, 1]), ("group", nn.GroupNorm, [1, 0, 0, 0, 1]), ("none", None, [1] * 5)],
)
def test_a_norm_replaces_the_bias_of_each_inner_layer(
    norm: str, kind: type[nn.Module] | None, biases: list[int]
) -> None:
    model = PatchDiscriminator(8, 3, norm)
    norms = [module for module in model.main if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)]
    assert [type(module) for module in norms] == ([] if kind is None else [kind] * 3)
    convolutions = [module for module in model.main if isinstance(module, nn.Conv2d)]
    assert [int(layer.bias is not None) for layer in convolutions] == biases
    for module in norms:
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == min(32, module.num_channels)
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


@pytest.mark.parametrize(("norm", "is_apart"), [("batch", False), ("group", True), ("none", True)])
def test_without_batch_normalization_an_image_does_not_depend_on_the_others(norm: str, is_apart: bool) -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(6, 2, norm, blur=True)  # The widths 12 and 24 have 4 and 8 groups.
    images: Tensor = torch.randn(3, 3, 32, 32)
    together, alone = model(images)[:1], model(images[:1])
    assert torch.allclose(together, alone, atol=1e-5) == is_apart


def test_the_settings_of_a_discriminator_rebuild_it_and_the_cost_counts_the_blurs_larger_maps() -> None:
    values: dict[str, Any] = {
        "discriminator_channels": 4,
        "discriminator_layers": 2,
        "discriminator_norm": "none",
        "discriminator_blur": True,
    }
    settings = TrainVQSettings(**values)
    model = PatchDiscriminator(**settings.discriminator_layout)
    assert model.settings == values
    default = PatchDiscriminator(**TrainVQSettings().discriminator_layout)
    assert default.settings == PatchDiscriminator().settings
    shape, device = (2, 3, 32, 32), torch.device("cpu")
    strided, blurred = (
        cost._discriminator_pass((("channels", 4), ("layers", 2), ("blur", blur)), shape, device, "float32")
        for blur in (False, True)
    )
    assert blurred.flops > 2 * strided.flops
    assert blurred.saved_bytes > 2 * strided.saved_bytes
    assert blurred.parameters == strided.parameters
