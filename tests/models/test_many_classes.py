"""Priors of more classes than codes: every class and no class have rows of their own, in every mode."""

from __future__ import annotations

import pytest
import torch

from movq_cli.models import priors
from movq_cli.models.priors import CodePrior
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings

K = 8
SHAPE = CodeShape(height=2, width=3, chunks=2, codebook_size=K)
MODES = ["mask", "auto", "depth"]


def prior_of(mode: str, classes: int, layers: int = 3) -> CodePrior:
    torch.manual_seed(0)
    settings = PriorSettings(mode=mode, layers=layers, heads=2, width=16, hidden=32, classes=classes)
    return priors.build(settings, SHAPE).eval()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("classes", [1, K - 1, K])
def test_up_to_k_classes_share_the_rows_of_the_codes(mode: str, classes: int) -> None:
    prior = prior_of(mode, classes)
    assert prior.table.num_embeddings == K + 1
    assert prior.no_class == prior.unknown == K
    every = torch.arange(K + 1)
    assert torch.equal(prior.class_tokens(every), prior.tokens(every[:, None, None].expand(-1, 1, 2)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("classes", [K + 1, 3 * K])
def test_each_class_beyond_k_and_no_class_have_a_row_that_no_code_has(mode: str, classes: int) -> None:
    prior = prior_of(mode, classes)
    assert prior.table.num_embeddings == classes + 1
    tokens = prior.class_tokens(torch.arange(classes + 1))
    assert len(tokens.flatten(1).unique(dim=0)) == classes + 1
    codes = torch.arange(K + 1)
    of_codes = prior.tokens(codes[:, None, None].expand(-1, 1, 2))
    assert torch.equal(tokens[:K], of_codes[:K])
    assert torch.equal(tokens[classes], of_codes[K])  # No class is the unknown code, as with few classes.


@pytest.mark.parametrize("mode", MODES)
def test_every_class_is_learned_sampled_and_guided(mode: str) -> None:
    classes = K + 5
    prior = prior_of(mode, classes)
    ids = torch.tensor([0, K - 1, K, classes - 1, prior.no_class])
    codes = torch.randint(K, (len(ids), *SHAPE.size))
    prior(codes, ids).square().sum().backward()
    gradient = prior.table.weight.grad
    assert gradient is not None
    rows = [0, K - 1, K + 1, classes, K]
    assert (gradient[rows].abs().sum(1) > 0).all()
    for guidance in (0.0, 2.0):
        settings = SampleSettings(steps=3, guidance=guidance)
        drawn = prior.decode([1, 1], torch.tensor([K, classes - 1]), settings)
        assert drawn.shape == (2, *SHAPE.size)
        assert 0 <= int(drawn.min()) <= int(drawn.max()) < K
        alone = prior.decode([1], torch.tensor([classes - 1]), settings)
        assert torch.equal(alone[0], drawn[1])
