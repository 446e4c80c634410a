"""Stage 1's losses against numpy, closed forms, and the adaptive weight's textbook computation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from movq_cli.training.losses import adaptive_weight, discriminator_hinge, generator_hinge, reconstruction
from movq_cli.training_settings import TrainVQSettings

LIMIT = TrainVQSettings().adaptive_weight_limit
SHAPES = st.tuples(st.integers(1, 3), st.just(3), st.integers(2, 9), st.integers(2, 9))


class LocalContrast(nn.Module):
    """A distance of images in LPIPS's place: the mean square of the difference's horizontal steps."""

    def forward(self, images, originals):
        return (images - originals).diff(dim=3).square().mean((1, 2, 3), keepdim=True)


@settings(max_examples=40, deadline=None)
@given(
    shape=SHAPES,
    seed=st.integers(0, 1000),
    weights=st.tuples(*[st.floats(0, 10)] * 3),
    with_perceptual=st.booleans(),
)
def test_the_reconstruction_loss_is_the_weighted_sum_of_its_terms(shape, seed, weights, with_perceptual):
    generator = torch.Generator().manual_seed(seed)
    images, originals = (2 * torch.rand(2, *shape, generator=generator) - 1).unbind()
    chosen = TrainVQSettings(l1_weight=weights[0], l2_weight=weights[1], perceptual_weight=weights[2])
    loss = reconstruction(images, originals, chosen, LocalContrast() if with_perceptual else None)
    away = images.numpy().astype(np.float64) - originals.numpy()
    terms = [np.abs(away).mean(), (away**2).mean(), (np.diff(away, axis=3) ** 2).mean() if with_perceptual else 0.0]
    assert [loss.l1.item(), loss.l2.item(), loss.perceptual.item()] == pytest.approx(terms, rel=1e-5)
    assert loss.total.item() == pytest.approx(np.dot(weights, terms), rel=1e-5)
    assert all(term.shape == () for term in loss)


def test_the_reconstruction_loss_passes_its_gradient_to_the_images():
    torch.manual_seed(0)
    images, originals = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 5, 4)
    reconstruction(images, originals, TrainVQSettings(l1_weight=2, l2_weight=3), None).total.backward()
    away = (images - originals).detach()
    torch.testing.assert_close(images.grad, (2 * away.sign() + 6 * away) / away.numel())


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_the_hinge_losses_are_their_closed_forms(shape, seed):
    real, fake = 2 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    expected = (np.maximum(0, 1 - real.double().numpy()).mean() + np.maximum(0, 1 + fake.double().numpy()).mean()) / 2
    assert discriminator_hinge(real, fake).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert generator_hinge(fake).item() == pytest.approx(-fake.double().mean().item(), rel=1e-5, abs=1e-6)


def test_a_discriminator_that_is_sure_and_right_has_nothing_to_learn():
    real, fake = torch.tensor([1.0, 1.5, 9.0], requires_grad=True), torch.tensor([-1.0, -7.0], requires_grad=True)
    loss = discriminator_hinge(real, fake)
    loss.backward()
    assert loss == 0
    assert real.grad is not None and fake.grad is not None
    assert real.grad.count_nonzero() == fake.grad.count_nonzero() == 0


def test_the_hinge_pulls_real_logits_up_and_fake_ones_down_each_by_half_a_mean():
    real, fake = torch.tensor([0.5, 2.0, -3.0, 0.0], requires_grad=True), torch.tensor([0.5, -2.0], requires_grad=True)
    discriminator_hinge(real, fake).backward()
    assert real.grad is not None and fake.grad is not None
    assert real.grad.tolist() == [-1 / 8, 0, -1 / 8, -1 / 8]
    assert fake.grad.tolist() == [1 / 4, 0]
    logits = torch.tensor([[5.0], [-5.0]], requires_grad=True)
    generator_hinge(logits).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5], [-0.5]]


def small_network(channels, kernel, seed):
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.SiLU())
    discriminator = nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, padding=1)
    )
    return trunk, nn.Conv2d(channels, 3, kernel, padding=kernel // 2), discriminator


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 8),
    height=st.integers(4, 12),
    width=st.integers(4, 12),
    kernel=st.sampled_from([1, 3]),
    strength=st.sampled_from([1e-2, 1.0, 1e2]),
    seed=st.integers(0, 1000),
)
def test_the_adaptive_weight_is_that_of_two_backward_passes_to_the_last_layer(
    batch, channels, height, width, kernel, strength, seed
):
    trunk, last, discriminator = small_network(channels, kernel, seed)
    originals = torch.rand(batch, 3, height, width) * 2 - 1
    features = trunk(originals)
    images = last(features)
    nll = F.l1_loss(images, originals) + F.mse_loss(images, originals)
    adversarial = strength * generator_hinge(discriminator(images))
    of_nll = torch.autograd.grad(nll, last.weight, retain_graph=True)[0].double().norm()
    of_adversarial = torch.autograd.grad(adversarial, last.weight, retain_graph=True)[0].double().norm()
    expected = (of_nll / (of_adversarial + 1e-4)).clamp(0, 1e4).item()

    image_gradient = torch.autograd.grad(nll, images, retain_graph=True)[0]
    adversarial_gradient = torch.autograd.grad(adversarial, images)[0]
    weight = adaptive_weight(features, last, image_gradient, adversarial_gradient, LIMIT)
    assert weight.item() == pytest.approx(expected, rel=1e-5)
    assert weight.shape == ()
    assert not weight.requires_grad
    assert last.weight.grad is None


def gradients(seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(4, 3, 3, padding=1), torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)


def test_the_adaptive_weight_stays_within_0_and_ten_thousand():
    last, features, image, adversarial = gradients()
    nothing = torch.zeros_like(image)
    assert adaptive_weight(features, last, image, nothing, LIMIT) == 1e4
    assert adaptive_weight(features, last, 1e6 * image, adversarial, LIMIT) == 1e4
    assert adaptive_weight(features, last, nothing, adversarial, LIMIT) == 0
    assert adaptive_weight(features, last, nothing, nothing, LIMIT) == 0
    assert 0 < adaptive_weight(features, last, image, adversarial, LIMIT) < 1e4


def test_the_adaptive_weight_stays_below_a_limit_and_is_unchanged_under_it():
    last, features, image, adversarial = gradients()
    free = adaptive_weight(features, last, image, adversarial, LIMIT)
    assert adaptive_weight(features, last, image, adversarial, free.item() / 2) == free / 2
    assert adaptive_weight(features, last, image, adversarial, free.item() * 2) == free


def test_without_an_adversarial_gradient_a_faint_image_gradient_is_weighed_by_the_floor_of_the_norm():
    last, features, image, _ = gradients()
    faint = 1e-6 * image
    at_weight = torch.autograd.grad((last(features) * faint).sum(), last.weight)[0].double().norm().item()
    assert at_weight / 1e-4 < 1e4
    weight = adaptive_weight(features, last, faint, torch.zeros_like(image), LIMIT).item()
    assert weight == pytest.approx(at_weight / 1e-4, rel=1e-5)


def test_the_adaptive_weight_is_computed_in_float32_whatever_autocast_says():
    last, features, image, adversarial = gradients()
    image.requires_grad_()
    low = features.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        weight = adaptive_weight(low, last, image, adversarial, LIMIT)
    assert weight.dtype == torch.float32
    assert weight == adaptive_weight(low.float(), last, image, adversarial, LIMIT)
    assert not weight.requires_grad
