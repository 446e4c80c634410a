"""The decoding orders halton and random: which codes a step decides, and that images stay independent of each other."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch
from scipy import stats
from torch import Tensor

from movq_cli.models.halton import halton_ranks
from movq_cli.models.masked_prior import MaskedPrior, revealed
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings

SHAPE = CodeShape(height=3, width=4, chunks=2, codebook_size=11)


def prior(classes: int = 0, shape: CodeShape = SHAPE) -> MaskedPrior:
    torch.manual_seed(0)
    model = MaskedPrior(PriorSettings(layers=1, heads=2, width=16, hidden=32, classes=classes), shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def reflected(index: int, base: int) -> Fraction:
    """The radical inverse, as the sum of its digits."""
    total, scale = Fraction(0), Fraction(1, base)
    while index:
        total, index, scale = total + scale * (index % base), index // base, scale / base
    return total


@pytest.mark.parametrize(("height", "width"), [(16, 16), (3, 4), (8, 12), (9, 6), (1, 5)])
def test_with_one_chunk_the_order_is_that_of_the_halton_sequence(height: int, width: int) -> None:
    expected: list[int] = []
    index = 0
    while len(expected) < height * width:
        index += 1
        cell = floor(height * reflected(index, 2)) * width + floor(width * reflected(index, 3))
        if cell not in expected:
            expected.append(cell)
    ranks = halton_ranks(CodeShape(height=height, width=width, chunks=1, codebook_size=8))
    assert ranks.argsort().tolist() == expected


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("side", [4, 16])
def test_a_position_gets_its_next_code_when_all_others_have_as_many(chunks: int, side: int) -> None:
    shape = CodeShape(height=side, width=side, chunks=chunks, codebook_size=8)
    order = halton_ranks(shape).argsort()
    assert sorted(order.tolist()) == list(range(shape.codes))
    position, chunk = order // chunks, order % chunks
    rounds = position.view(chunks, shape.positions)
    assert all(row.equal(rounds[0]) for row in rounds)
    assert sorted(rounds[0].tolist()) == list(range(shape.positions))
    assert sorted((position * chunks + chunk).tolist()) == list(range(shape.codes))


@pytest.mark.parametrize("chunks", [2, 4])
def test_every_part_of_a_round_has_all_chunks_and_all_parts_of_the_image(chunks: int) -> None:
    """A chunk that depended on the parity of the index would be seen in one half of the image alone."""
    shape = CodeShape(height=16, width=16, chunks=chunks, codebook_size=8)
    order = halton_ranks(shape).argsort()
    part = order[:64]
    row, column, chunk = part // chunks // 16, part // chunks % 16, part % chunks
    for counts in (
        torch.bincount((row // 4) * 4 + column // 4, minlength=16),
        torch.bincount(chunk * 2 + row // 8, minlength=2 * chunks),
        torch.bincount(chunk * 2 + column // 8, minlength=2 * chunks),
    ):
        mean = 64 / len(counts)
        assert counts.min() >= mean / 2
        assert counts.max() <= mean * 3 / 2


def decided_at(model: MaskedPrior, settings: SampleSettings, known: Tensor | None = None, images: int = 3) -> Tensor:
    """The step at which each code [B, N] of the images was decided."""
    unknown: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: unknown.append(inputs[0].flatten(1) == model.unknown))
    model.decode(range(images), None, settings, known)
    handle.remove()
    return sum(mask.expand(images, -1).long() for mask in unknown) - 1  # type: ignore[return-value]


@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
def test_each_step_decides_the_next_codes_of_the_halton_order(schedule: str) -> None:
    settings = SampleSettings.model_validate({"steps": 5, "order": "halton", "mask_schedule": schedule})
    counts = revealed(SHAPE.codes, 5, settings.mask_schedule)
    expected = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))[halton_ranks(SHAPE)]
    steps = decided_at(prior(), settings)
    assert steps.equal(expected.expand(3, -1))


def test_known_codes_are_passed_over_in_the_halton_order() -> None:
    model = prior()
    known = torch.full((1, *SHAPE.size), model.unknown)
    known[0, 1] = 3
    steps = decided_at(model, SampleSettings(steps=4, order="halton"), known, images=1)[0]
    hidden = known.flatten() == model.unknown
    assert (steps[~hidden] == -1).all()
    order = halton_ranks(SHAPE)[hidden].argsort()
    assert steps[hidden][order].tolist() == sorted(steps[hidden].tolist())


def test_the_random_order_prefers_no_code_and_differs_between_images() -> None:
    settings = SampleSettings(steps=4, order="random")
    steps = decided_at(prior(), settings, images=600)
    counts = torch.tensor(revealed(SHAPE.codes, 4))
    assert all(torch.bincount(image, minlength=4).equal(counts) for image in steps)
    assert len(steps.unique(dim=0)) > 590
    first = (steps <= 1).double().sum(0).numpy()
    assert stats.chisquare(first).pvalue > 1e-3


@pytest.mark.parametrize("order", ["halton", "random"])
def test_an_image_depends_on_its_own_seed_alone(order: str) -> None:
    model, labels = prior(classes=3), torch.arange(6) % 3
    settings = SampleSettings(steps=4, order=order, guidance=1.0)
    together = model.decode(range(6), labels, settings)
    alone = [model.decode([seed], labels[seed : seed + 1], settings) for seed in range(6)]
    assert torch.equal(torch.cat(alone), together)
    assert len(together.flatten(1).unique(dim=0)) == 6
