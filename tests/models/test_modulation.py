"""Equation 4 and the initial features against loops in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from movq_cli.models.modulation import (
    ConstantFeature,
    FourierFeature,
    Norm,
    ProjectedFeature,
    SinusoidFeature,
    SpatialNorm,
)
from movq_cli.settings import ModulationSettings

GROUPS, EPS = 32, 1e-6


def random_norm(channels, condition_channels, kernel=1, affine=False):
    norm = SpatialNorm(channels, condition_channels, 32, ModulationSettings(kernel_size=kernel, affine=affine)).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm


def equation_4(norm, x, condition):
    """Position by position, from the definition alone."""
    weights = {name: parameter.detach().numpy() for name, parameter in norm.named_parameters()}
    x, condition = x.numpy(), condition.numpy()
    batch, channels, height, width = x.shape
    members = channels // GROUPS
    radius = weights["conv_y.weight"].shape[-1] // 2
    tall, wide = height // condition.shape[2], width // condition.shape[3]
    out = np.zeros_like(x)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                maps = {"conv_y": weights["conv_y.bias"].copy(), "conv_b": weights["conv_b.bias"].copy()}
                for di in range(-radius, radius + 1):
                    for dj in range(-radius, radius + 1):
                        row, column = i + di, j + dj
                        if not (0 <= row < height and 0 <= column < width):
                            continue
                        seen = condition[b, :, row // tall, column // wide]
                        for name in maps:
                            maps[name] += weights[f"{name}.weight"][:, :, di + radius, dj + radius] @ seen
                for c in range(channels):
                    first = c // members * members
                    group = x[b, first : first + members]
                    normal = (x[b, c, i, j] - group.mean()) / np.sqrt(((group - group.mean()) ** 2).mean() + EPS)
                    if "norm_layer.weight" in weights:
                        normal = normal * weights["norm_layer.weight"][c] + weights["norm_layer.bias"][c]
                    out[b, c, i, j] = maps["conv_y"][c] * normal + maps["conv_b"][c]
    return out


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
    members=st.integers(1, 2),
    condition_channels=st.integers(1, 4),
    grid=st.tuples(st.integers(2, 3), st.integers(1, 3)),  # torch refuses groups of one value
    factor=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.sampled_from([1, 3]),
    affine=st.booleans(),
)
def test_the_modulated_norm_is_equation_4(seed, batch, members, condition_channels, grid, factor, kernel, affine):
    torch.manual_seed(seed)
    norm = random_norm(GROUPS * members, condition_channels, kernel, affine)
    x = 3 * torch.randn(batch, GROUPS * members, grid[0] * factor[0], grid[1] * factor[1], dtype=torch.float64) + 1
    condition = torch.randn(batch, condition_channels, *grid, dtype=torch.float64)
    np.testing.assert_allclose(norm(x, condition).detach(), equation_4(norm, x, condition), atol=1e-9, rtol=1e-9)


def test_a_1x1_convolution_before_the_upsampling_gives_what_it_gives_after():
    torch.manual_seed(0)
    norm = random_norm(64, 5)
    x, condition = torch.randn(2, 64, 12, 8, dtype=torch.float64), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    spread = condition.repeat_interleave(4, dim=2).repeat_interleave(2, dim=3)
    after = norm.conv_y(spread) * F.group_norm(x, GROUPS, eps=EPS) + norm.conv_b(spread)
    torch.testing.assert_close(norm(x, condition), after, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_it_starts_as_a_plain_group_norm(kernel, affine):
    norm = SpatialNorm(64, 7, 32, ModulationSettings(kernel_size=kernel, affine=affine))
    # So faint that epsilon, 1e-6 and not PyTorch's 1e-5, decides the scale.
    x, condition = 1e-3 * torch.randn(2, 64, 6, 4), torch.randn(2, 7, 3, 2)
    plain = F.group_norm(x, GROUPS, eps=EPS)
    torch.testing.assert_close(norm(x, condition), plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(Norm(64, 32)(x, condition), plain, atol=1e-6, rtol=0)
    assert (norm.norm_layer.weight is not None) == affine


def assert_every_weight_learns(module: torch.nn.Module) -> None:
    """Check that no gradient of a parameter has an element of zero."""
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() == parameter.numel(), name


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_maps_learn_from_the_first_step_and_the_condition_from_the_second(kernel):
    torch.manual_seed(0)
    norm = SpatialNorm(32, 3, 32, ModulationSettings(kernel_size=kernel))
    x, condition = torch.randn(2, 32, 4, 4), torch.randn(2, 3, 2, 2, requires_grad=True)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    target = torch.randn(2, 32, 4, 4)
    (norm(x, condition) - target).square().mean().backward()
    assert_every_weight_learns(norm)
    assert condition.grad is not None
    assert condition.grad.count_nonzero() == 0  # both weights are 0
    optimizer.step()
    (norm(x, condition) - target).square().mean().backward()
    assert condition.grad.count_nonzero() == condition.numel()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([1e-3, 1.0, 4.0]),
)
def test_fourier_features_are_sine_and_cosine_of_the_quantized_vector(shape, seed, spread):
    quantized = spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    feature = FourierFeature()(quantized)
    angle = 2 * np.pi * quantized.numpy().astype(np.float64)
    np.testing.assert_allclose(feature, np.concatenate([np.sin(angle), np.cos(angle)], axis=1), atol=1e-5)
    assert feature.shape == (shape[0], 2 * shape[1], *shape[2:])
    assert feature.abs().max() <= 1
    assert not list(FourierFeature().parameters())


def test_fourier_features_are_computed_in_float32_even_of_bf16_vectors():
    quantized = torch.randn(1, 4, 3, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        feature = FourierFeature()(quantized)
    assert feature.dtype == torch.float32
    assert torch.equal(feature, FourierFeature()(quantized.float()))


def test_the_projected_feature_is_the_sine_of_a_learned_map_of_each_vector():
    torch.manual_seed(0)
    feature, quantized = ProjectedFeature(5, 8), 4 * torch.randn(2, 5, 3, 4)
    weight, bias = (parameter.detach().double().numpy() for parameter in feature.projection.parameters())
    out = feature(quantized)
    for b, i, j in np.ndindex(2, 3, 4):
        vector = quantized[b, :, i, j].double().numpy()
        np.testing.assert_allclose(out[b, :, i, j].detach(), np.sin(weight[:, :, 0, 0] @ vector + bias), atol=1e-5)
    out.square().sum().backward()
    assert_every_weight_learns(feature)


def test_sinusoids_are_vaswanis_rows_first():
    channels, height, width = 32, 5, 7
    feature = SinusoidFeature(channels)(torch.randn(1, 3, height, width))[0]
    quarter = channels // 4
    for place in range(height):
        for k in range(quarter):
            angle = place / 10_000 ** (k / quarter)
            np.testing.assert_allclose(feature[k, place], np.full(width, np.sin(angle)), atol=1e-6)
            np.testing.assert_allclose(feature[quarter + k, place], np.full(width, np.cos(angle)), atol=1e-6)
    for place in range(width):
        for k in range(quarter):
            angle = place / 10_000 ** (k / quarter)
            np.testing.assert_allclose(feature[2 * quarter + k, :, place], np.full(height, np.sin(angle)), atol=1e-6)
            np.testing.assert_allclose(feature[3 * quarter + k, :, place], np.full(height, np.cos(angle)), atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 32), width=st.integers(1, 32), channels=st.sampled_from([32, 96]))
def test_sinusoids_tell_every_position_apart_and_no_image(height, width, channels):
    feature = SinusoidFeature(channels)(torch.randn(3, 2, height, width))
    assert feature.shape == (3, channels, height, width)
    assert torch.equal(feature[0], feature[1])
    assert torch.equal(feature[0], feature[2])
    places = feature[0].flatten(1).T
    apart = torch.cdist(places, places) + torch.eye(len(places)) * 10
    assert apart.min() > 1e-2


def test_the_constant_is_learned_and_the_same_for_every_image():
    feature = ConstantFeature(8, 4, 4)
    out = feature(torch.randn(3, 5, 4, 4))
    assert torch.equal(out, feature.constant.expand(3, -1, -1, -1))
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    assert feature.constant.grad is not None
    torch.testing.assert_close(feature.constant.grad[0], weight.sum(0))


def linear_resampling(size, source):
    """[size, source] float64: each new centre between the two old centres around it, the border repeated."""
    matrix = np.zeros((size, source))
    for i in range(size):
        place = min(max((i + 0.5) * source / size - 0.5, 0), source - 1)
        low = int(place)
        matrix[i, low] += 1 - (place - low)
        matrix[i, min(low + 1, source - 1)] += place - low
    return matrix


@settings(max_examples=20, deadline=None)
@given(grid=st.integers(1, 5), height=st.integers(1, 9), width=st.integers(1, 9))
def test_another_grid_gets_the_constant_resampled(grid, height, width):
    feature = ConstantFeature(3, grid, grid)
    out = feature(torch.randn(2, 5, height, width)).detach()
    constant = feature.constant[0].detach().double().numpy()
    expected = linear_resampling(height, grid) @ constant @ linear_resampling(width, grid).T
    for image in out:
        np.testing.assert_allclose(image, expected, atol=1e-5)
