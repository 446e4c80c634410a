"""Metrics of sets equal plain definitions and the reference implementations, however the data arrives."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from movq_cli.errors import BadRequestError
from movq_cli.evaluation import distributions
from movq_cli.evaluation.distributions import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def features(count: int, width: int = 8, shift: float = 0.0, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * scale + shift


def statistics(*batches: Tensor) -> FeatureStatistics:
    found = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        found.update(batch)
    return found


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_statistics_do_not_depend_on_how_the_stream_is_cut_or_ordered(sizes: list[int], random: Random) -> None:
    whole = features(sum(sizes), shift=100.0)
    batches = list(whole.split(sizes))
    random.shuffle(batches)
    found = statistics(*batches)
    np.testing.assert_allclose(found.mean, whole.double().mean(dim=0), rtol=1e-9)
    np.testing.assert_allclose(found.covariance, np.cov(whole.double().numpy().T), rtol=1e-9, atol=1e-9)


def test_statistics_of_two_processes_merge() -> None:
    a, b = features(5), features(7, seed=1)
    merged = statistics(a)
    merged.merge(statistics(b))
    np.testing.assert_allclose(merged.covariance, statistics(a, b).covariance, atol=1e-12)
    merged.merge(FeatureStatistics(8))
    assert merged.count == 12


@pytest.mark.parametrize("count", [200, 20])  # 20 samples of 32 features: a singular covariance
def test_frechet_distance_is_that_of_the_matrix_square_root(count: int) -> None:
    real = statistics(features(200, 32, seed=1) @ features(32, 32, seed=2))
    fake = statistics(features(count, 32, shift=0.3, seed=3))
    root = scipy.linalg.sqrtm(real.covariance.numpy() @ fake.covariance.numpy())
    difference = (real.mean - fake.mean).square().sum().item()
    expected = difference + real.covariance.trace() + fake.covariance.trace() - 2 * np.trace(root).real
    found = frechet_distance(real.mean, real.covariance, fake.mean, fake.covariance)
    # scipy's own root of a singular matrix is good to some 1e-7.
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_is_symmetric_and_zero_to_itself() -> None:
    a, b = statistics(features(50, 64)), statistics(features(60, 64, shift=1, seed=1))
    there = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    # Of eigenvalues that are 0 the rounding stays, 1e-16, and it is their roots that are summed.
    assert there == pytest.approx(frechet_distance(b.mean, b.covariance, a.mean, a.covariance), rel=1e-7)
    assert 0 <= frechet_distance(a.mean, a.covariance, a.mean, a.covariance) < 1e-3


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(BadRequestError, match="at least 2"):
        _ = statistics(features(1)).covariance


def plain_mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n = len(x)
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j)
    between = sum(kernel(a, b) for a in x for b in y)
    return within / (n * (n - 1)) - 2 * between / n**2


def test_kernel_distance_is_the_plain_double_sum() -> None:
    real, fake = features(12), features(12, shift=0.5, seed=1)
    found = kernel_distance(real, fake, subsets=3, subset_size=100)
    # Each subset is the whole set: every draw gives the same value.
    assert found.mean == pytest.approx(plain_mmd(real.double(), fake.double()), abs=1e-10)
    assert found.std == pytest.approx(0, abs=1e-10)


def test_kernel_distance_and_inception_score_are_torch_fidelitys() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, fake = features(80), features(70, shift=0.5, seed=1)
    theirs = kid_features_to_metric(fake, real, kid_subsets=10, kid_subset_size=40, verbose=False)
    ours = kernel_distance(real, fake, subsets=10, subset_size=40)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
    logits = features(73, 20, scale=3.0)
    score = inception_score(logits, splits=10)
    assert score.mean == pytest.approx(isc_features_to_metric(logits)["inception_score_mean"], rel=1e-12)
    assert score.std == pytest.approx(isc_features_to_metric(logits)["inception_score_std"], rel=1e-9)


def test_inception_score_is_the_exponential_of_the_mean_divergence() -> None:
    logits = features(40, 10, scale=2.0).double()
    p = torch.softmax(logits, dim=1)
    divergences = [sum(float(v) * math.log(v / m) for v, m in zip(row, p.mean(dim=0), strict=True)) for row in p]
    assert inception_score(logits, splits=1).mean == pytest.approx(math.exp(sum(divergences) / 40))


def test_inception_score_spans_one_class_to_all_of_them() -> None:
    certain = torch.eye(10).repeat(30, 1) * 2000  # exact zeros among the probabilities
    assert inception_score(certain, splits=1).mean == pytest.approx(10)
    assert inception_score(certain[:1].repeat(30, 1), splits=10).mean == pytest.approx(1)
    assert inception_score(certain[:3], splits=10).mean == pytest.approx(1)  # fewer images than splits


def brute_share(points: list[list[float]], manifold: list[list[float]], k: int) -> float:
    radii = [sorted(math.dist(x, y) for y in manifold)[k] for x in manifold]
    inside = [any(math.dist(point, x) <= radius for x, radius in zip(manifold, radii, strict=True)) for point in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize("tile", [4096, 7, 1])
def test_precision_and_recall_are_those_of_all_distances(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(distributions, "_TILE", tile)
    real, fake = features(40, 4), features(50, 4, shift=0.8, seed=1)
    found = precision_recall(real, fake, k=3)
    assert found.precision == pytest.approx(brute_share(fake.tolist(), real.tolist(), 3))
    assert found.recall == pytest.approx(brute_share(real.tolist(), fake.tolist(), 3))
    assert 0 < found.recall < 1


def test_a_collapsed_generator_is_precise_and_forgets() -> None:
    real = features(200)
    fake = real[0] + features(200, scale=0.01, seed=1)
    found = precision_recall(real, fake, k=3)
    assert found.precision > 0.95
    assert found.recall < 0.05


def test_noise_far_away_is_neither() -> None:
    assert precision_recall(features(50), features(50, shift=30.0, seed=1), k=3) == (0, 0)
    assert precision_recall(features(50), features(50), k=3) == (1, 1)


def test_references_are_a_seeded_part_of_the_real_set() -> None:
    real, fake = features(60), features(40, shift=0.5, seed=1)
    part = precision_recall(real, fake, references=20, k=3)
    assert part == precision_recall(real, fake, references=20, k=3)
    assert part != precision_recall(real, fake, references=None, k=3)


def test_sets_too_small_for_a_figure_are_refused() -> None:
    few = features(3)
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(few, few, k=3)
    with pytest.raises(ValueError, match="kernel distance needs at least 2"):
        kernel_distance(few[:1], few, subsets=1, subset_size=2)
    with pytest.raises(ValueError, match="Inception Score needs at least 1"):
        inception_score(few[:0], splits=1)
