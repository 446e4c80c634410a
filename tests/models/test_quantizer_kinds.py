"""SimVQ and FSQ against loops in float64, with one to eight chunks, and their settings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from movq_cli.errors import BadRequestError
from movq_cli.models import quantizers
from movq_cli.models.quantizers.finite_scalar import FiniteScalarQuantizer
from movq_cli.models.quantizers.linear_codebook import LinearCodebookQuantizer
from movq_cli.settings import TokenizerSettings

CHUNKS = [1, 2, 4, 8]


@pytest.mark.parametrize("chunks", CHUNKS)
def test_simvq_chooses_the_nearest_transformed_vector_and_trains_the_layer_alone(chunks: int) -> None:
    torch.manual_seed(chunks)
    quantizer, width = LinearCodebookQuantizer(30, 4), 4
    z = torch.randn(2, width * chunks, 3, 2)
    out = quantizer(z)
    frozen, layer = quantizer.embedding.weight.double(), quantizer.embedding_proj
    weight, bias = torch.autograd.grad(out.losses["codebook"], (layer.weight, layer.bias))
    entries = frozen @ layer.weight.detach().double().T + layer.bias.detach().double()
    split = z.double().permute(0, 2, 3, 1).reshape(2, 3, 2, chunks, width)
    distances = (split[..., None, :] - entries).square().sum(-1)
    assert torch.equal(out.codes, distances.argmin(-1))
    assert torch.equal(quantizer.encode(z), out.codes)
    away = 2 / z.numel() * (entries[out.codes] - split)
    expected = torch.einsum("...i,...j->ij", away, frozen[out.codes])
    torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(bias.double(), away.flatten(0, -2).sum(0), atol=1e-6, rtol=1e-4)
    assert not quantizer.embedding.weight.requires_grad
    assert torch.equal(quantizer.encode(quantizer.decode(out.codes)), out.codes)


def test_a_step_on_one_entry_of_simvq_moves_all_entries() -> None:
    torch.manual_seed(0)
    quantizer = LinearCodebookQuantizer(30, 4)
    before = quantizer.decode(torch.arange(30).view(30, 1, 1, 1)).detach()
    quantizer(torch.randn(1, 4, 1, 1)).losses["codebook"].backward()
    torch.optim.SGD(quantizer.embedding_proj.parameters(), lr=1.0).step()
    after = quantizer.decode(torch.arange(30).view(30, 1, 1, 1))
    assert (after != before).flatten(1).any(1).all()
    assert quantizer.revive(torch.ones(30, dtype=torch.bool), torch.randn(1, 4, 2, 2), lambda rows, n: rows[:n]) == {}


def published_fsq(z: NDArray[np.float64], levels: list[int]) -> tuple[list[float], int, list[float]]:
    """Values in [-1, 1], code and gradient factors of one vector, by the listing in appendix A.1 of the FSQ paper."""
    values, factors, code, basis = [], [], 0, 1
    for x, count in zip(z, levels, strict=True):
        half = (count - 1) * (1 - 1e-3) / 2
        offset = 0.0 if count % 2 == 1 else 0.5
        bounded = math.tanh(x + math.tan(offset / half)) * half - offset
        level = round(bounded)
        values.append(level / (count // 2))
        factors.append((1 - math.tanh(x + math.tan(offset / half)) ** 2) * half / (count // 2))
        code += (level + count // 2) * basis
        basis *= count
    return values, code, factors


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("levels", [[8, 5, 5], [2, 3], [4, 4, 7, 2]])
def test_fsq_gives_the_values_codes_and_gradients_of_the_published_listing(chunks: int, levels: list[int]) -> None:
    torch.manual_seed(chunks)
    quantizer, width = FiniteScalarQuantizer(levels, len(levels)), len(levels)
    assert not list(quantizer.parameters())
    z = (2 * torch.randn(2, width * chunks, 3, 2)).requires_grad_()
    weight = torch.randn(z.shape)
    out = quantizer(z)
    (gradient,) = torch.autograd.grad((out.vectors * weight).sum(), z)
    assert out.losses == {}
    assert torch.equal(quantizer.encode(z), out.codes)
    torch.testing.assert_close(quantizer.decode(out.codes), out.vectors)
    for b, i, j, k in torch.cartesian_prod(*map(torch.arange, (2, 3, 2, chunks))).tolist():
        channels = slice(k * width, (k + 1) * width)
        values, code, factors = published_fsq(z.detach()[b, channels, i, j].double().numpy(), levels)
        assert out.vectors[b, channels, i, j].tolist() == pytest.approx(values, abs=1e-5)
        assert out.codes[b, i, j, k] == code
        expected = weight[b, channels, i, j].double() * torch.tensor(factors)
        torch.testing.assert_close(gradient[b, channels, i, j].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [2, 2, 2], [3], [7, 4, 6]])
def test_each_code_of_fsq_has_its_own_vector_and_all_codes_are_reached(levels: list[int]) -> None:
    quantizer, count = FiniteScalarQuantizer(levels, len(levels)), math.prod(levels)
    vectors = quantizer.decode(torch.arange(count).view(count, 1, 1, 1)).flatten(1)
    assert len(vectors.unique(dim=0)) == count
    assert vectors.abs().max() <= 1
    torch.manual_seed(0)
    codes = quantizer.encode(3 * torch.randn(64, len(levels), 60, 60))
    assert len(codes.unique()) == count


def test_wider_chunks_of_fsq_are_projected_by_layers_that_all_chunks_share() -> None:
    torch.manual_seed(0)
    wide, narrow = FiniteScalarQuantizer([5, 4, 3], 8), FiniteScalarQuantizer([5, 4, 3], 3)
    z = torch.randn(2, 32, 3, 2)
    split = z.permute(0, 2, 3, 1).unflatten(-1, (4, 8))
    inner = wide.project_in(split).flatten(-2).permute(0, 3, 1, 2)
    assert torch.equal(wide.encode(z), narrow.encode(inner))
    vectors = narrow(inner).vectors.permute(0, 2, 3, 1).unflatten(-1, (4, 3))
    expected = wide.project_out(vectors).flatten(-2).permute(0, 3, 1, 2)
    torch.testing.assert_close(wide(z).vectors, expected)
    torch.testing.assert_close(wide.decode(wide.encode(z)), expected)


@pytest.mark.parametrize(
    ("settings", "words", "remedy"),
    [
        ({}, "needs the levels", "vq.fsq_levels"),
        ({"fsq_levels": (8, 5)}, "40 codes .* codebook_size is 1024", "vq.codebook_size=40"),
        ({"fsq_levels": (4, 4), "codebook_size": 16, "normalize_codes": True}, "normalize_codes=false", "normalize"),
    ],
)
def test_fsq_refuses_settings_that_do_not_fit(settings: dict[str, object], words: str, remedy: str) -> None:
    with pytest.raises(BadRequestError, match=words) as raised:
        quantizers.build(TokenizerSettings.model_validate({"quantizer": "fsq", **settings}))
    assert remedy in str(raised.value.hint)


def test_every_quantizer_is_built_by_its_name() -> None:
    settings = TokenizerSettings(codebook_size=16, fsq_levels=(4, 4))
    built = {name: quantizers.build(settings.model_copy(update={"quantizer": name})) for name in ("vq", "simvq", "fsq")}
    assert {*built, "gumbel"} == set(quantizers.QUANTIZERS)
    assert len({type(quantizer) for quantizer in built.values()}) == 3
