"""Entropies and mutual information of codes against loops, closed forms and scikit-learn."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from movq_cli.evaluation import code_statistics
from movq_cli.evaluation.codes import CodeStatistics


def test_the_plain_values_are_those_of_a_loop_in_float64() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 5, 300).astype(np.uint16)
    second = ((first + rng.integers(0, 3, 300)) % 5).astype(np.uint16)
    both, one, other = Counter(zip(first, second, strict=True)), Counter(first), Counter(second)
    information = sum(n / 300 * math.log(n * 300 / (one[a] * other[b])) for (a, b), n in both.items())
    found = code_statistics.mutual_information(first, second)
    assert found.plain == pytest.approx(information, rel=1e-12)
    entropy = -sum(n / 300 * math.log(n / 300) for n in one.values())
    assert code_statistics.entropy(first, corrected=False) == pytest.approx(entropy, rel=1e-12)
    assert code_statistics.entropy(first) == pytest.approx(entropy + (len(one) - 1) / 600, rel=1e-12)


def test_the_adjusted_value_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    first = rng.integers(0, 40, 2000)
    for noise in (1, 10, 40):
        second = (first + rng.integers(0, noise, 2000)) % 40
        share = metrics.adjusted_mutual_info_score(first, second, average_method="min")
        found = code_statistics.mutual_information(first, second)
        chance = metrics.cluster.expected_mutual_information(
            metrics.cluster.contingency_matrix(first, second, sparse=True), len(first)
        )
        assert found.by_chance == pytest.approx(chance, rel=0.05)
        assert found.adjusted / found.limit == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("pairs", [200, 20_000])
def test_independent_codes_have_none_and_copies_have_the_entropy_at_any_number_of_images(pairs: int) -> None:
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 64, (2, pairs))
    independent = code_statistics.mutual_information(first, second)
    assert independent.adjusted == pytest.approx(0, abs=0.1 * independent.limit)
    assert independent.plain > independent.adjusted
    copies = code_statistics.mutual_information(first, 63 - first)
    assert copies.adjusted == pytest.approx(code_statistics.entropy(first, corrected=False), rel=1e-9)
    constant = code_statistics.mutual_information(first, np.zeros_like(first))
    assert constant.adjusted == 0 == pytest.approx(constant.limit)


def test_the_correction_of_an_entropy_halves_its_error_at_least() -> None:
    rng = np.random.default_rng(3)
    corrected = [math.log(32) - code_statistics.entropy(rng.integers(0, 32, 100)) for _ in range(200)]
    plain = [math.log(32) - code_statistics.entropy(rng.integers(0, 32, 100), corrected=False) for _ in range(200)]
    assert abs(np.mean(corrected)) < 0.5 * np.mean(plain)


def test_each_kind_of_neighbor_is_found_where_it_is_and_nowhere_else() -> None:
    """Rows repeat one code, chunk 1 repeats chunk 0, and nothing depends on the position."""
    rng = np.random.default_rng(4)
    rows = rng.integers(0, 8, (400, 6, 1, 1)).astype(np.uint16)
    codes = np.broadcast_to(rows, (400, 6, 5, 2))
    statistics = CodeStatistics(8, codes)
    values, variants = statistics.values()
    entropy = code_statistics.entropy(codes, corrected=False)
    assert values == pytest.approx(
        {
            "code_entropy": math.log(8),
            "code_entropy_of_positions": math.log(8),
            "code_information_position": 0,
            "code_information_horizontal": entropy,
            "code_information_vertical": 0,
            "code_information_chunks": entropy,
        },
        abs=0.02,
    )
    assert set(values) == set(variants)
    assert np.array(statistics.protocol()["entropy_of_positions"]).shape == (6, 5)
    assert list(statistics.warnings()) == []


def test_a_code_that_its_position_decides_has_no_entropy_there() -> None:
    codes = np.broadcast_to(np.arange(12).reshape(1, 3, 4, 1), (50, 3, 4, 1))
    statistics = CodeStatistics(12, codes.astype(np.uint16))
    values, _ = statistics.values()
    assert values["code_entropy_of_positions"] == 0
    assert values["code_information_position"] == pytest.approx(math.log(12))
    assert "code_information_chunks" not in values


def test_a_single_row_has_no_vertical_neighbors_and_few_images_cause_a_warning() -> None:
    codes = np.random.default_rng(5).integers(0, 4096, (3, 1, 9, 2)).astype(np.uint16)
    statistics = CodeStatistics(4096, codes)
    assert set(statistics.information) == {"position", "horizontal", "chunks"}
    (line,) = statistics.warnings()
    assert line.startswith("3 images are few for a codebook of 4096 entries")
