"""The masked prior: its schedule, its loss, and its decoding against loops over single codes."""

import math
from functools import partialmethod
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import nn

from movq_cli.models.masked_prior import (
    MaskedPrior,
    mask_ratio,
    masked_after,
    masked_loss,
    revealed,
    training_mask,
)
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings

SHAPE = CodeShape(height=3, width=4, chunks=2, codebook_size=11)
UNKNOWN = SHAPE.codebook_size


def random_model(classes=0):
    """Its weights so large that codes depend on what is visible: some are near certain, others open."""
    torch.manual_seed(0)
    model = MaskedPrior(PriorSettings(layers=2, heads=2, width=16, hidden=32, classes=classes), SHAPE).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.8)
    nn.init.normal_(model.head.weight, std=0.4)
    return model


def partly_known(images, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (images, SHAPE.height, SHAPE.width, SHAPE.chunks)
    codes = torch.randint(0, SHAPE.codebook_size, size, generator=generator)
    return codes.masked_fill(torch.rand(size, generator=generator) >= share, UNKNOWN)


# --- the schedule ----------------------------------------------------------------------------------------------------


def still_masked(total, steps):
    """Codes masked after each step, of an image that starts with so many."""
    start, masked = torch.tensor([total]), [total]
    for step in range(steps):
        masked.append(masked_after(step, steps, start, torch.tensor([masked[-1]])).item())
    return masked[1:]


@pytest.mark.parametrize(
    "published",
    [
        [20, 58, 95, 127, 156, 177, 192, 199],
        [9, 26, 43, 60, 74, 88, 101, 111, 121, 126, 132, 133],
    ],
)
def test_the_papers_schedules_reveal_these_many_codes_a_step(published):
    assert revealed(1024, len(published)) == published
    assert revealed(3, 5) == [1, 1, 0, 0, 1]


@settings(max_examples=200, deadline=None)
@given(total=st.integers(0, 20_000), steps=st.integers(1, 200))
def test_the_codes_masked_follow_the_cosine_between_their_bounds(total, steps):
    masked = [total, *still_masked(total, steps)]
    assert masked[-1] == 0
    for step, (before, after) in enumerate(pairwise(masked[:-1])):
        assert min(1, before) <= after <= max(1, before - 1) or before == after == 0
        share = total * math.cos(math.pi / 2 * (step + 1) / steps)
        if 1 <= share < before - 1 and not math.isclose(share, round(share), rel_tol=1e-9):
            assert after == math.floor(share)
        elif share >= before > 1:
            assert after == before - 1


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 100), more=st.integers(0, 20_000))
def test_with_a_code_for_every_step_every_step_reveals_one_and_the_first_are_the_cautious_ones(steps, more):
    total = steps + more
    masked = [total, *still_masked(total, steps)]
    for step, (before, after) in enumerate(pairwise(masked)):
        assert after < before
        # The cosine is concave: never fewer are left than if each step revealed as many.
        assert after >= total * (steps - step - 1) // steps


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 100), half=st.integers(1, 10_000))
def test_two_thirds_of_the_way_half_the_codes_are_masked_to_the_code(steps, half):
    # cos(pi/3) is exactly one half; in floating point it comes out on either side.
    steps, start = 3 * steps, torch.tensor([2 * half])
    assert masked_after(2 * steps // 3 - 1, steps, start, start) == half


def test_images_with_different_numbers_unknown_have_their_own_schedules():
    start, now = torch.tensor([[0], [1], [2], [30], [1024]]), torch.tensor([[0], [1], [1], [5], [1000]])
    for step in range(8):
        together = masked_after(step, 8, start, now)
        assert together.dtype == torch.int64
        assert together.shape == start.shape
        alone = [masked_after(step, 8, *row).item() for row in zip(start, now, strict=True)]
        assert together.flatten().tolist() == alone


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_mask_ratio_falls_along_a_quarter_cosine():
    progress = torch.linspace(0, 1, 50, dtype=torch.float64)
    np.testing.assert_allclose(mask_ratio(progress), np.sin(np.pi / 2 * (1 - progress.numpy())), atol=1e-12)


def test_each_image_has_a_ratio_of_its_own_drawn_from_the_schedule():
    mask = training_mask((1500, 16, 16, 4), torch.Generator().manual_seed(0))
    assert mask.dtype == torch.bool
    ratios = mask.flatten(1).double().mean(1).numpy()
    # cos(pi/2 U) is below r with probability (2 / pi) arcsin(r).
    assert stats.kstest(ratios, lambda r: 2 / np.pi * np.arcsin(np.clip(r, 0, 1))).pvalue > 1e-3
    assert ratios.mean() == pytest.approx(2 / math.pi, abs=4 * ratios.std() / math.sqrt(len(ratios)))
    assert abs(np.corrcoef(ratios[1:], ratios[:-1])[0, 1]) < 4 / math.sqrt(len(ratios))


@pytest.mark.parametrize("other", ["chunk", "right", "below"])
def test_codes_of_a_position_and_neighbours_are_masked_independently(other):
    mask = training_mask((300, 32, 32, 2), torch.Generator().manual_seed(1))
    pairs = {
        "chunk": (mask[..., 0], mask[..., 1]),
        "right": (mask[:, :, ::2], mask[:, :, 1::2]),
        "below": (mask[:, ::2], mask[:, 1::2]),
    }
    statistic, images = 0.0, 0
    for one, two in zip(*pairs[other], strict=True):
        table = np.histogram2d(one.flatten().numpy(), two.flatten().numpy(), bins=2, range=[[0, 1], [0, 1]])[0]
        if table.sum(0).min() * table.sum(1).min() / table.sum() >= 5:
            statistic += stats.chi2_contingency(table, correction=False).statistic
            images += 1
    assert images > 200
    assert 1e-3 < stats.chi2.sf(statistic, images) < 1 - 1e-3


def test_the_mask_is_a_function_of_the_generator_alone():
    shape = (5, 4, 4, 2)
    generator = torch.Generator().manual_seed(7)
    first, second = training_mask(shape, generator), training_mask(shape, generator)
    torch.rand(3)
    assert torch.equal(first, training_mask(shape, torch.Generator().manual_seed(7)))
    assert not torch.equal(first, second)


LOSS_CASES = {
    "shape": st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    "size": st.integers(2, 9),
    "smoothing": st.sampled_from([0.0, 0.1, 0.5]),
    "share": st.sampled_from([0.0, 0.3, 1.0]),
    "seed": st.integers(0, 1000),
}


def loss_inputs(shape, size, share, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, size, generator=generator)
    codes = torch.randint(0, size, shape, generator=generator)
    return logits.requires_grad_(), codes, torch.rand(shape, generator=generator) < share


@settings(max_examples=60, deadline=None)
@given(**LOSS_CASES)
def test_the_loss_is_the_mean_cross_entropy_of_the_masked_codes(shape, size, smoothing, share, seed):
    logits, codes, mask = loss_inputs(shape, size, share, seed)
    # In float64: a loss near 0 is the small difference of large numbers, of which float32 has few correct digits.
    loss = masked_loss(logits.double(), codes, mask, smoothing)
    terms = []
    for index in np.ndindex(*shape):
        if mask[index]:
            log_probability = special.log_softmax(logits[index].detach().double().numpy())
            target = np.full(size, smoothing / size)
            target[codes[index]] += 1 - smoothing
            terms.append(-(target * log_probability).sum())
    assert loss.shape == ()
    assert loss.item() == pytest.approx(np.mean(terms) if terms else 0.0, rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(**LOSS_CASES)
def test_only_masked_codes_give_the_loss_a_gradient(shape, size, smoothing, share, seed):
    logits, codes, mask = loss_inputs(shape, size, share, seed)
    masked_loss(logits, codes, mask, smoothing).backward()
    target = (1 - smoothing) * np.eye(size)[codes] + smoothing / size
    expected = (special.softmax(logits.detach().double().numpy(), -1) - target) / max(mask.sum().item(), 1)
    expected[~mask.numpy()] = 0
    np.testing.assert_allclose(logits.grad, expected, atol=1e-6)
    assert logits.grad[~mask].count_nonzero() == 0


def test_the_loss_is_float32_also_of_bf16_logits():
    logits, codes, mask = loss_inputs((2, 3, 3, 2), 9, 0.5, 0)
    low = logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_loss(low, codes, mask, 0.1)
    expected = masked_loss(low.float(), codes, mask, 0.1)
    for found in (loss, masked_loss(low, codes, mask, 0.1)):
        assert found.dtype == torch.float32
        assert found == expected


def test_knowing_nothing_costs_the_logarithm_of_the_codebook():
    codes = torch.randint(0, 1024, (2, 4, 4, 4))
    loss = masked_loss(torch.zeros(2, 4, 4, 4, 1024), codes, torch.ones_like(codes, dtype=torch.bool), 0.1)
    assert loss.item() == pytest.approx(math.log(1024), rel=1e-6)


# --- decoding ---------------------------------------------------------------------------------------------------------


def logits_by_hand(model, codes, label, guidance):
    """[N, K] float64 of one image's codes [N]; the two sides of guidance in passes of their own."""

    def run(which):
        classes = None if which is None else torch.tensor([which])
        grid = torch.tensor(codes).view(1, SHAPE.height, SHAPE.width, SHAPE.chunks)
        with torch.no_grad():
            return model(grid, classes).double().numpy().reshape(SHAPE.codes, -1)

    plain = run(label)
    if label is None or guidance == 0:
        return plain
    return plain + guidance * (plain - run(UNKNOWN))


def decode_by_hand(model, seed, label, sample, known):
    """One image's codes before each step and after the last, each a list of N, code by code."""
    numbers = torch.rand(sample.steps, 2, SHAPE.codes, generator=torch.Generator().manual_seed(seed)).double().numpy()
    codes = [UNKNOWN] * SHAPE.codes if known is None else known.flatten().tolist()
    history, start = [codes], codes.count(UNKNOWN)
    for step in range(sample.steps):
        logits = logits_by_hand(model, codes, label, sample.guidance)
        codes, confidence = list(codes), {}
        for place in range(SHAPE.codes):
            if codes[place] != UNKNOWN:
                continue
            probability = np.exp(logits[place] / sample.temperature)
            probability /= probability.sum()
            code, passed = 0, probability[0]
            while passed <= numbers[step, 0, place]:
                code += 1
                passed += probability[code]
            codes[place] = code
            noise = -math.log(-math.log(numbers[step, 1, place]))
            heat = sample.choice_temperature * (1 - (step + 1) / sample.steps)
            confidence[place] = math.log(probability[code]) + heat * noise
        if step < sample.steps - 1:
            hidden = math.floor(start * math.cos(math.pi / 2 * (step + 1) / sample.steps) + 1e-9)
            hidden = max(1, min(len(confidence) - 1, hidden))
            for place in sorted(confidence, key=confidence.__getitem__)[:hidden]:
                codes[place] = UNKNOWN
        history.append(codes)
    return history


SAMPLES = [
    (SampleSettings(steps=1), 0, 0.0),
    (SampleSettings(steps=2), 0, 0.0),
    (SampleSettings(steps=8), 0, 0.0),
    (SampleSettings(steps=5, temperature=0.7, choice_temperature=0), 0, 0.0),
    (SampleSettings(steps=5, temperature=1.4, choice_temperature=20), 3, 0.0),
    (SampleSettings(steps=8, guidance=1.5), 3, 0.0),
    (SampleSettings(steps=8), 0, 0.4),
    (SampleSettings(steps=6, guidance=0.5), 3, 0.8),
    (SampleSettings(steps=40), 0, 0.0),
]


@pytest.mark.parametrize(("sample", "classes", "share"), SAMPLES)
def test_decoding_is_what_loops_over_single_codes_give_at_every_step(sample, classes, share):
    model = random_model(classes)
    seeds, labels = [0, 5, 2**31, 77], torch.arange(4) % classes if classes else None
    known = partly_known(4, share) if share else None
    steps = []
    # What the model is shown; under guidance the same codes twice.
    model.register_forward_pre_hook(lambda _, inputs: steps.append(inputs[0][:4].flatten(1).tolist()))
    codes = model.decode(seeds, labels, sample, known)
    steps.append(codes.flatten(1).tolist())
    model = random_model(classes)
    for image, seed in enumerate(seeds):
        label = None if labels is None else labels[image].item()
        expected = decode_by_hand(model, seed, label, sample, None if known is None else known[image])
        # Where nothing is known, the first step is passed once for each class.
        first = steps[0][image] if share else [UNKNOWN] * SHAPE.codes
        assert [first, *(step[image] for step in steps[1:])] == expected


@pytest.mark.parametrize(("classes", "guidance", "passed"), [(0, 0.0, 1), (3, 0.0, 3), (3, 1.0, 6)])
def test_a_first_step_with_nothing_known_is_passed_once_for_each_class(classes, guidance, passed):
    model, seen = random_model(classes), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    labels = torch.arange(8) % classes if classes else None
    model.decode(range(8), labels, SampleSettings(steps=2, guidance=guidance))
    assert seen == [passed, 16 if guidance else 8]


def test_guidance_that_rises_over_the_steps_ends_whole():
    settings = SampleSettings(guidance=3.0, guidance_schedule="linear")
    assert [settings.guidance_at(step, 4) for step in range(4)] == [0.75, 1.5, 2.25, 3.0]
    assert [SampleSettings(guidance=3.0).guidance_at(step, 2) for step in range(2)] == [3.0, 3.0]


@settings(max_examples=20, deadline=None)
@given(
    images=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 5),
    steps=st.integers(1, 30),
    share=st.floats(0, 1),
    choice_temperature=st.sampled_from([0.0, 4.5, 1e3]),
)
def test_known_codes_stay_and_all_others_are_drawn(images, seed, steps, share, choice_temperature):
    known = partly_known(images, share, seed % 1000)
    given_codes = known.clone()
    sample = SampleSettings(steps=steps, choice_temperature=choice_temperature)
    codes = random_model().decode(range(seed, seed + images), None, sample, known)
    assert torch.equal(known, given_codes)
    assert codes.dtype == torch.int64
    assert torch.equal(codes[known != UNKNOWN], known[known != UNKNOWN])
    assert ((codes >= 0) & (codes < SHAPE.codebook_size)).all()


def test_images_that_are_all_known_come_back_without_a_pass():
    model, known, passes = random_model(), partly_known(3, 1.1), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    codes = model.decode([0, 1, 2], None, SampleSettings(), known)
    assert torch.equal(codes, known)
    assert codes.data_ptr() != known.data_ptr()
    known[1, 0, 0, 0] = UNKNOWN
    assert not passes
    assert torch.equal(model.decode([0, 1, 2], None, SampleSettings(), known)[::2], known[::2])
    assert passes


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 3])
def test_compiled_blocks_draw_the_same_in_batches_of_any_size(classes, monkeypatch):
    model, sample = random_model(classes), SampleSettings(guidance=1.0)
    labels = torch.arange(7) % classes if classes else None
    expected = model.decode(range(7), labels, sample)
    # What is captured is what CUDA compiles; generating code for the CPU would take minutes.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True))
    model.compile_blocks()
    torch._dynamo.utils.counters.clear()
    parts = [model.decode(part, None if labels is None else labels[part], sample) for part in (range(4), range(4, 7))]
    assert torch.equal(torch.cat(parts), expected)
    # One program for a single row, one for the first number of rows, one for any other: not one for each block.
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_a_single_unknown_code_is_drawn_given_all_others():
    known = partly_known(1, 1.1).repeat(400, 1, 1, 1)
    known[:, 1, 2, 1] = UNKNOWN
    model = random_model()
    codes = model.decode(range(400), None, SampleSettings(), known)
    with torch.no_grad():
        expected = model(known[:1])[0, 1, 2, 1].double().softmax(-1).numpy() * 400
    counts = np.bincount(codes[:, 1, 2, 1], minlength=SHAPE.codebook_size)
    common = expected >= 5
    observed, expected = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    assert common.sum() > 1
    assert stats.chisquare(observed + 1e-9, expected + 1e-9).pvalue > 1e-3


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_image_is_the_same_in_any_batch_and_any_company(guidance, share):
    model, sample = random_model(classes=3), SampleSettings(guidance=guidance)
    seeds, labels = torch.arange(100, 116), torch.arange(16) % 3
    known = partly_known(16, share)
    together = model.decode(seeds.tolist(), labels, sample, known)
    for size in (1, 3):
        parts = [
            model.decode(seeds[i : i + size].tolist(), labels[i : i + size], sample, known[i : i + size])
            for i in range(0, 16, size)
        ]
        assert torch.equal(torch.cat(parts), together)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.decode(seeds[order].tolist(), labels[order], sample, known[order]), together[order])
    assert len(together.flatten(1).unique(dim=0)) > 12


def test_nothing_known_is_everything_to_be_drawn():
    model, nothing = random_model(), torch.full((2, 3, 4, 2), UNKNOWN)
    assert torch.equal(
        model.decode([3, 4], None, SampleSettings(), nothing), model.decode([3, 4], None, SampleSettings())
    )


def test_drawing_does_not_touch_the_global_generator_nor_read_it():
    model = random_model()
    first = model.decode([3], None, SampleSettings())
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(model.decode([3], None, SampleSettings()), first)
    assert torch.equal(torch.get_rng_state(), before)


def guided(model, codes, labels, guidance):
    return model._guided_logits(codes, labels, SampleSettings(guidance=guidance), 0)


def test_guided_logits_move_away_from_the_unconditional_ones():
    model, codes = random_model(classes=3), partly_known(5, 0.5)
    labels, nobody = torch.tensor([0, 1, 2, 1, UNKNOWN]), torch.full((5,), UNKNOWN)
    with torch.no_grad():
        conditional, unconditional = model(codes, labels), model(codes, nobody)
        assert torch.equal(guided(model, codes, labels, 0), conditional)
        for guidance in (0.5, 1.0, 4.0):
            expected = (1 + guidance) * conditional - guidance * unconditional
            torch.testing.assert_close(guided(model, codes, labels, guidance), expected, atol=1e-4, rtol=1e-4)
    assert (conditional[0] - unconditional[0]).abs().max() > 0.1


def test_without_guidance_the_model_sees_each_image_once():
    model, codes, seen = random_model(classes=3), partly_known(5, 0.5), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    labels = torch.tensor([0, 1, 2, 1, 0])
    for guidance in (0.0, 2.0):
        guided(model, codes, labels, guidance)
    assert seen == [5, 10]


def test_an_unconditional_prior_has_nothing_to_guide():
    model, codes = random_model(), partly_known(2, 0.5)
    with torch.no_grad():
        assert torch.equal(guided(model, codes, None, 3.0), model(codes))
