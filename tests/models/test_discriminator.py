"""PatchGAN: its size, what a logit sees, how it starts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from movq_cli.models.discriminator import PatchDiscriminator


def test_the_default_has_the_parameters_of_vqgans():
    with torch.device("meta"):
        model = PatchDiscriminator()
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_765_633


def test_the_width_doubles_up_to_eight_times():
    with torch.device("meta"):
        model = PatchDiscriminator(channels=4, layers=5)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [4, 8, 16, 32, 32, 32, 1]


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 2), height=st.integers(24, 70), width=st.integers(24, 70))
def test_there_is_a_logit_for_every_eighth_pixel_but_two(batch, height, width):
    logits = PatchDiscriminator(channels=2)(torch.randn(batch, 3, height, width))
    assert logits.shape == (batch, 1, height // 8 - 2, width // 8 - 2)


def test_an_image_of_256_pixels_gives_30_by_30_logits():
    with torch.device("meta"):
        assert PatchDiscriminator()(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_patch_in_full_and_nothing_else(layers, patch):
    torch.manual_seed(0)
    model = PatchDiscriminator(channels=4, layers=layers).double()
    # The norms look at the whole batch.
    model.main = nn.Sequential(*(layer for layer in model.main if not isinstance(layer, nn.BatchNorm2d)))
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = model(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(0) > 0
    rows, columns = seen.any(1), seen.any(0)
    assert rows.sum() == columns.sum() == patch
    assert seen[rows][:, columns].all()


def test_it_starts_from_normal_weights_of_spread_2_percent():
    torch.manual_seed(0)
    model = PatchDiscriminator()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert (len(convolutions), len(norms)) == (5, 3)
    for layer in convolutions:
        some = layer.weight.detach().flatten()[:50_000].numpy()
        assert stats.kstest(some, stats.norm(0, 0.02).cdf).pvalue > 1e-3
    scales = np.concatenate([norm.weight.detach().numpy() for norm in norms])
    assert stats.kstest(scales, stats.norm(1, 0.02).cdf).pvalue > 1e-3
    assert all(norm.bias.count_nonzero() == 0 for norm in norms)


def test_a_bias_stands_only_where_no_norm_follows():
    model = PatchDiscriminator(channels=2)
    biases = [module.bias is not None for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert biases == [True, False, False, False, True]


def test_its_norms_keep_no_running_statistics():
    assert not list(PatchDiscriminator(channels=4).buffers())
