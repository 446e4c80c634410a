"""Perturbed codes against the distances between entries in float64, and their gradient in a forward pass."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from movq_cli.models import perturbation as module
from movq_cli.models import quantizers
from movq_cli.models.perturbation import Perturbation, entries_of, perturb
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset, TokenizerSettings

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_a_share_of_the_codes_in_a_share_of_the_images_becomes_near_codes(chunks: int) -> None:
    torch.manual_seed(chunks)
    entries = torch.randn(50, 3)
    codes = torch.randint(50, (10, 4, 5, chunks))
    # A single neighbor is the code itself.
    assert torch.equal(perturb(codes, entries, Perturbation(1.0, 1.0, 1)), codes)
    count = 4 * 5 * chunks
    distances = torch.cdist(entries.double(), entries.double())
    seen = torch.zeros(6)
    for _ in range(20):
        replaced = perturb(codes, entries, Perturbation(0.35, 0.5, 6))
        ranks = distances.argsort(1).argsort(1)[codes, replaced]
        assert ranks.max() < 6
        changed = (replaced != codes).flatten(1).sum(1)
        assert (changed > 0).sum() <= 3
        assert changed.max() <= count // 2
        seen += torch.bincount(ranks[replaced != codes], minlength=6)[:6]
    assert seen[0] == 0
    assert stats.chisquare(seen[1:]).pvalue > 1e-3  # each neighbor is as likely as the others


def test_the_replacements_do_not_depend_on_how_many_distances_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    entries, codes = torch.randn(30, 4), torch.randint(30, (3, 4, 4, 2))
    whole = perturb(codes, entries, Perturbation(1.0, 0.9, 5), torch.Generator().manual_seed(1))
    monkeypatch.setattr(module, "_MAX_DISTANCES", 70)
    assert torch.equal(perturb(codes, entries, Perturbation(1.0, 0.9, 5), torch.Generator().manual_seed(1)), whole)
    assert not torch.equal(perturb(codes, entries, Perturbation(1.0, 0.9, 5), torch.Generator().manual_seed(2)), whole)


@pytest.mark.parametrize("name", ["vq", "simvq", "fsq", "gumbel"])
def test_the_entries_are_the_vectors_of_the_codes(name: str) -> None:
    chunks = 1 if name == "gumbel" else 4
    settings = TokenizerSettings(quantizer=name, codebook_size=16, fsq_levels=(4, 4), chunks=chunks)
    quantizer = quantizers.build(settings)
    entries = entries_of(quantizer, 16, CPU)
    codes = torch.randint(16, (2, 3, 3, chunks))
    expected = entries[codes].flatten(-2).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantizer.decode(codes), expected)


def test_a_perturbed_forward_pass_changes_the_decoder_alone(tiny: Preset) -> None:
    torch.manual_seed(0)
    model = Tokenizer(tiny.vq).train()
    weight, images = model.encoder.conv_in.weight, torch.rand(2, 3, 16, 16)
    plain = model(images)
    (expected,) = torch.autograd.grad(plain.images.square().sum(), weight)
    # With one neighbor nothing is replaced, and the gradient is that of a plain pass up to rounding.
    model.perturbation = Perturbation(1.0, 1.0, 1)
    (same,) = torch.autograd.grad(model(images).images.square().sum(), weight)
    torch.testing.assert_close(same, expected, rtol=1e-2, atol=1e-3)
    model.perturbation = Perturbation(1.0, 1.0, 16)
    perturbed = model(images)
    assert torch.equal(perturbed.codes, plain.codes)
    assert perturbed.losses == plain.losses
    assert not torch.equal(perturbed.images, plain.images)
    (gradient,) = torch.autograd.grad(perturbed.images.square().sum(), weight)
    assert gradient.count_nonzero()
    torch.testing.assert_close(model.eval()(images).images, plain.images)
