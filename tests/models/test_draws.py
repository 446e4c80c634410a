"""The random numbers of sampling: distributions, edges, and one image's independence of the others."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import special, stats

from movq_cli.models.draws import draw_codes, gumbel, image_uniforms, truncated
from movq_cli.settings import SampleSettings

LARGEST = 1 - 2.0**-24
"""Of torch.rand's float32 values."""


def at(temperature):
    return SampleSettings(temperature=temperature)


def uniforms(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_an_images_numbers_are_those_of_its_own_seed(seeds, shape):
    numbers = image_uniforms(seeds, shape)
    assert numbers.shape == (len(seeds), *shape)
    assert numbers.dtype == torch.float32
    assert ((numbers >= 0) & (numbers < 1)).all()
    for index, seed in enumerate(seeds):
        assert torch.equal(numbers[index], torch.rand(shape, generator=torch.Generator().manual_seed(seed)))


def test_drawing_images_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    image_uniforms([1, 2], (5,))
    assert torch.equal(torch.get_rng_state(), before)


def test_neighbouring_seeds_are_independent():
    numbers = image_uniforms(range(4000), (3,)).numpy()
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < 4 / math.sqrt(len(column))
    assert len(np.unique(numbers[:, 0])) > 3990


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_of_a_seed_counts(bit):
    numbers = image_uniforms([5, 5 ^ (1 << bit)], (8,))
    assert not torch.equal(numbers[0], numbers[1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_codes_come_as_often_as_their_probability_says(temperature):
    count, logits = 200_000, torch.tensor([0.3, -1.0, 2.0, 0.0, -2.5, 1.1, 0.7])
    codes, _ = draw_codes(logits.expand(count, -1), uniforms(count), at(temperature))
    expected = special.softmax(logits.double().numpy() / temperature) * count
    assert stats.chisquare(np.bincount(codes, minlength=7), expected).pvalue > 1e-3


def test_each_row_draws_from_its_own_distribution():
    count, logits = 60_000, 2 * torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    codes, _ = draw_codes(logits.expand(count, -1, -1, -1), uniforms(count * 6).view(count, 3, 2), at(1.0))
    for i in range(3):
        for j in range(2):
            expected = special.softmax(logits[i, j].double().numpy()) * count
            assert stats.chisquare(np.bincount(codes[:, i, j], minlength=5), expected).pvalue > 1e-3


def test_a_large_codebook_is_drawn_from_to_its_end():
    size, count = 65_536, 400
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1))
    drawn = uniforms(count)
    codes, _ = draw_codes(logits.expand(count, -1), drawn, at(1.0))
    cumulative = special.softmax(logits.double().numpy()).cumsum()
    expected = np.searchsorted(cumulative, drawn.double().numpy(), side="right")
    # Rounding may move a code whose interval ends within a float32's spacing of the number drawn.
    assert np.abs(codes.numpy() - expected).max() <= 1
    assert (codes.numpy() == expected).mean() > 0.98
    last, _ = draw_codes(logits, torch.tensor(LARGEST), at(1.0))
    assert last >= size - 5


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(
        st.one_of(st.just(-math.inf), st.floats(-20, 20, width=32), st.floats(-1e4, 1e4, width=32)),
        min_size=1,
        max_size=12,
    ),
    uniform=st.one_of(st.sampled_from([0.0, 2.0**-24, 0.25, 0.5, LARGEST]), st.floats(0, LARGEST, width=32)),
    temperature=st.floats(0.1, 10),
)
def test_a_code_of_probability_0_is_never_drawn(logits, uniform, temperature):
    assume(max(logits) > -math.inf)
    codes, log_probability = draw_codes(torch.tensor(logits), torch.tensor(uniform), at(temperature))
    assert logits[codes] > -math.inf
    assert log_probability.isfinite()
    probability = special.softmax(np.array(logits, dtype=np.float64) / temperature)
    assert probability[codes] > 1e-46  # in float32 every other is 0


@pytest.mark.parametrize("uniform", [0.0, LARGEST])
@pytest.mark.parametrize("zeros", [[0], [4], [0, 4], [0, 1, 3, 4], [1, 2, 3]])
def test_the_extreme_numbers_draw_the_first_and_last_possible_code(uniform, zeros):
    logits = torch.zeros(5)
    logits[zeros] = -math.inf
    possible = [code for code in range(5) if code not in zeros]
    codes, _ = draw_codes(logits, torch.tensor(uniform), at(1.0))
    assert codes == (possible[0] if uniform == 0 else possible[-1])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 40), temperature=st.floats(0.2, 5))
def test_the_log_probabilities_are_of_the_codes_drawn(seed, size, temperature):
    logits = 3 * torch.randn(4, 3, size, generator=torch.Generator().manual_seed(seed))
    codes, log_probability = draw_codes(logits, uniforms(12, seed).view(4, 3), at(temperature))
    expected = special.log_softmax(logits.double().numpy() / temperature, axis=-1)
    expected = np.take_along_axis(expected, codes.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_probability, expected, atol=1e-5, rtol=1e-5)
    assert log_probability.dtype == torch.float32
    assert codes.dtype == torch.int64


def test_a_larger_number_never_draws_an_earlier_code():
    logits = 2 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    ordered = uniforms(5000).sort().values
    codes, _ = draw_codes(logits.expand(5000, -1), ordered, at(1.0))
    assert (codes.diff() >= 0).all()


def test_a_low_temperature_draws_the_most_likely_code():
    logits = torch.randn(1000, 9, generator=torch.Generator().manual_seed(0))
    codes, _ = draw_codes(logits, uniforms(1000), at(1e-4))
    assert (codes == logits.argmax(-1)).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_drawn_from_in_float32(dtype):
    logits = torch.randn(500, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        codes, log_probability = draw_codes(logits, uniforms(500), at(0.7))
    expected = draw_codes(logits.float(), uniforms(500), at(0.7))
    assert torch.equal(codes, expected[0])
    assert torch.equal(log_probability, expected[1])


def test_a_code_does_not_depend_on_its_company():
    logits, numbers = torch.randn(9, 6, 30, generator=torch.Generator().manual_seed(0)), uniforms(54).view(9, 6)
    codes, log_probability = draw_codes(logits, numbers, at(1.0))
    for i in range(9):
        alone = draw_codes(logits[i : i + 1], numbers[i : i + 1], at(1.0))
        assert torch.equal(alone[0][0], codes[i])
        assert torch.equal(alone[1][0], log_probability[i])


def test_gumbel_noise_is_standard():
    noise = gumbel(uniforms(200_000)).double().numpy()
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3
    assert abs(noise.mean() - np.euler_gamma) < 4 * math.pi / math.sqrt(6 * len(noise))
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.02)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2**24 - 1))
def test_gumbel_noise_is_its_closed_form(step):
    uniform = step * 2.0**-24
    # The distribution's own quantile function; float32 knows a number next to 1 to 2^-24 of it.
    assert gumbel(torch.tensor(uniform)).item() == pytest.approx(stats.gumbel_r.ppf(uniform), abs=2e-6, rel=2e-6)


def test_gumbel_noise_is_finite_and_rising_from_the_smallest_number_to_the_largest():
    noise = gumbel(torch.tensor([0.0, 2.0**-24, 2.0**-23, 0.5, 1 - 2.0**-23, LARGEST]))
    assert noise.isfinite().all()
    assert (noise.diff() > 0).all()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12),
    top_k=st.one_of(st.none(), st.integers(1, 14)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
    temperature=st.floats(0.3, 3),
)
def test_truncation_keeps_the_likeliest_codes_as_a_loop_does(logits, top_k, top_p, temperature):
    share = special.softmax(np.array(logits) / temperature)
    order = sorted(range(len(logits)), key=lambda code: -share[code])[:top_k]
    total = sum(share[code] for code in order)
    kept: list[int] = []
    mass = 0.0
    for code in order:
        assume(abs(mass - top_p) > 1e-4)  # on the edge rounding decides
        if mass >= top_p and kept:
            break
        kept.append(code)
        mass += share[code] / total
    chosen = SampleSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    assume(len({round(logit, 4) for logit in logits}) == len(logits))
    expected = np.zeros(len(logits))
    expected[kept] = share[kept] / share[kept].sum()
    found = truncated((torch.tensor(logits) / temperature).softmax(-1), chosen)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_nothing_is_truncated_by_default():
    probability = torch.randn(3, 7).softmax(-1)
    assert truncated(probability, SampleSettings()) is probability
    greedy, _ = draw_codes(probability.log(), uniforms(3), SampleSettings(top_k=1))
    assert torch.equal(greedy, probability.argmax(-1))
