"""The quantizer against brute force in float64, its gradients against closed forms, its health against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from movq_cli.errors import BadRequestError
from movq_cli.models import quantizers
from movq_cli.models.quantizer import CodebookHealth
from movq_cli.models.quantizers import vector as module
from movq_cli.models.quantizers.vector import VectorQuantizer
from movq_cli.settings import TokenizerSettings

SHAPES = {
    "batch": st.integers(1, 3),
    "height": st.integers(1, 4),
    "width": st.integers(1, 4),
    "chunks": st.integers(1, 4),
    "code_dim": st.integers(1, 9),
    "size": st.integers(2, 70),
    "seed": st.integers(0, 1000),
}


def ready(size=20, code_dim=3, chunks=2, batch=2, height=4, width=3, seed=0):
    """A quantizer whose entries are as spread as its input [B, D, h, w]."""
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(size, code_dim)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer, torch.randn(batch, chunks * code_dim, height, width)


def distances(z, entries):
    """Squared distances [B, h, w, c, K] in float64: chunk j is the channels from j d to (j + 1) d."""
    z, entries = z.detach().double().numpy(), entries.detach().double().numpy()
    width = entries.shape[1]
    chunks = [z[:, j * width : (j + 1) * width] for j in range(z.shape[1] // width)]
    return np.stack([((chunk.transpose(0, 2, 3, 1)[..., None, :] - entries) ** 2).sum(-1) for chunk in chunks], axis=-2)


def assert_nearest(codes, z, entries):
    """No entry is nearer than the chosen one by more than the rounding of the products z.e."""
    every = distances(z, entries)
    chosen = np.take_along_axis(every, codes.numpy()[..., None], -1)[..., 0]
    rounding = 2e-6 * z.double().norm(dim=1).max().item() * entries.detach().double().norm(dim=1).max().item()
    assert (chosen - every.min(-1)).max() <= rounding


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_each_chunk_gets_its_nearest_entry(batch, height, width, chunks, code_dim, size, seed):
    quantizer, z = ready(size, code_dim, chunks, batch, height, width, seed)
    out = quantizer(z)
    assert out.codes.shape == (batch, height, width, chunks)
    assert out.codes.dtype == torch.int64
    assert_nearest(out.codes, z, quantizer.embedding.weight)
    entries = quantizer.embedding.weight.detach()
    for j in range(chunks):
        vectors = out.vectors[:, j * code_dim : (j + 1) * code_dim].detach().permute(0, 2, 3, 1)
        torch.testing.assert_close(vectors, entries[out.codes[..., j]], atol=1e-5, rtol=0)
    assert torch.equal(quantizer.encode(z), out.codes)


@pytest.mark.parametrize("spread", [0.1, 1.0, 300.0])
def test_the_close_entries_of_the_initial_codebook_are_distinguished_under_bf16_autocast(spread):
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(1024, 64), spread * torch.randn(2, 256, 4, 4)
    assert quantizer.embedding.weight.abs().max() <= 1 / 1024
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
        codes = quantizer.encode(z)
    assert_nearest(out.codes, z, quantizer.embedding.weight)
    assert torch.equal(out.codes, codes)
    agreeing = out.codes.numpy() == distances(z, quantizer.embedding.weight).argmin(-1)
    assert agreeing.mean() > 0.99
    assert len(out.codes.unique()) > 100
    assert out.vectors.dtype == out.losses["codebook"].dtype == out.losses["commitment"].dtype == torch.float32


@pytest.mark.parametrize("held", [1, 50, 130])
def test_codes_are_the_nearest_however_few_distances_are_held_at_once(held, monkeypatch):
    quantizer, z = ready(size=40, code_dim=4, chunks=3, batch=2, height=3, width=3)
    expected = quantizer(z)
    monkeypatch.setattr(module, "_MAX_DISTANCES", held)
    out = quantizer(z)
    assert_nearest(out.codes, z, quantizer.embedding.weight)
    assert torch.equal(out.codes, expected.codes)
    assert torch.equal(out.vectors, expected.vectors)


def test_bf16_input_is_quantized_as_the_float32_it_stands_for():
    quantizer, z = ready()
    out, expected = quantizer(z.bfloat16()), quantizer(z.bfloat16().float())
    assert out.vectors.dtype == torch.float32
    assert torch.equal(out.vectors, expected.vectors)
    assert torch.equal(out.codes, expected.codes)
    assert out.losses == expected.losses


def test_a_chunk_of_channels_decides_its_own_code_and_no_other():
    quantizer, z = ready(size=200, code_dim=4, chunks=3)
    codes = quantizer.encode(z)
    for j in range(3):
        moved = z.clone()
        moved[:, 4 * j : 4 * (j + 1)] += 3
        changed = quantizer.encode(moved) != codes
        assert changed[..., j].float().mean() > 0.9
        changed[..., j] = False
        assert not changed.any()


def test_the_gradient_passes_straight_through():
    quantizer, z = ready()
    z.requires_grad_()
    weight = torch.randn(z.shape)
    (quantizer(z).vectors * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert quantizer.embedding.weight.grad is None or quantizer.embedding.weight.grad.count_nonzero() == 0


@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_the_codebook_loss_moves_the_chosen_entries_alone(batch, height, width, chunks, code_dim, size, seed):
    quantizer, z = ready(size, code_dim, chunks, batch, height, width, seed)
    z.requires_grad_()
    out = quantizer(z)
    out.losses["codebook"].backward()
    assert z.grad is None or z.grad.count_nonzero() == 0
    split = z.detach().double().permute(0, 2, 3, 1).reshape(-1, code_dim)
    entries = quantizer.embedding.weight.detach().double()
    expected, loss = torch.zeros_like(entries), 0.0
    for vector, code in zip(split, out.codes.flatten(), strict=True):
        expected[code] += 2 * (entries[code] - vector) / z.numel()
        loss += (entries[code] - vector).square().sum().item() / z.numel()
    torch.testing.assert_close(quantizer.embedding.weight.grad.double(), expected, atol=1e-6, rtol=1e-5)
    assert out.losses["codebook"].item() == pytest.approx(loss, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_the_commitment_loss_moves_the_input_alone(batch, height, width, chunks, code_dim, size, seed):
    quantizer, z = ready(size, code_dim, chunks, batch, height, width, seed)
    z.requires_grad_()
    out = quantizer(z)
    out.losses["commitment"].backward()
    assert quantizer.embedding.weight.grad is None or quantizer.embedding.weight.grad.count_nonzero() == 0
    away = z.detach().double() - quantizer.decode(out.codes).detach().double()
    torch.testing.assert_close(z.grad.double(), 2 * away / z.numel(), atol=1e-6, rtol=1e-5)
    assert out.losses["commitment"].item() == pytest.approx(away.square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("initial", [True, False])
def test_decoded_codes_encode_to_themselves(initial):
    quantizer, _ = ready(size=300, code_dim=8)
    if initial:
        quantizer = VectorQuantizer(300, 8)
    codes = torch.randint(0, 300, (3, 5, 4, 6))
    vectors = quantizer.decode(codes)
    assert vectors.shape == (3, 48, 5, 4)
    assert torch.equal(quantizer.encode(vectors), codes)
    assert torch.equal(quantizer(vectors).codes, codes)


def test_revived_entries_are_vectors_of_the_batch_and_used_ones_stay() -> None:
    quantizer, z = ready(size=400, code_dim=3, chunks=2, batch=1, height=2, width=2)
    before = quantizer.embedding.weight.detach().clone()
    unused = torch.arange(400) % 4 != 0
    changed = quantizer.revive(unused, z, lambda rows, count: rows[torch.randint(len(rows), (count,))])
    assert list(changed) == ["embedding.weight"]
    assert torch.equal(changed["embedding.weight"], unused)
    after = quantizer.embedding.weight
    assert torch.equal(after[~unused], before[~unused])
    vectors = torch.stack([z[0, 3 * j : 3 * j + 3, i, k] for i in range(2) for k in range(2) for j in range(2)])
    same = (after[unused][:, None] == vectors).all(-1)
    assert (same.sum(1) == 1).all()
    assert stats.chisquare(same.sum(0)).pvalue > 1e-3  # each vector as likely as the others


def test_with_no_unused_entry_nothing_changes() -> None:
    quantizer, z = ready()
    before = quantizer.embedding.weight.detach().clone()
    quantizer.revive(torch.zeros(20, dtype=torch.bool), z, lambda rows, count: rows.new_ones(count, rows.shape[1]))
    assert torch.equal(quantizer.embedding.weight, before)


def test_an_unknown_quantizer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadRequestError, match="unknown quantizer 'nosuch'") as raised:
        quantizers.build(TokenizerSettings(quantizer="nosuch"))
    assert "vq" in str(raised.value.hint)


def numpy_health(codes, size):
    counts = np.bincount(np.asarray(codes).ravel(), minlength=size)
    share = counts[counts > 0] / counts.sum()
    return (counts > 0).mean(), np.exp(-(share * np.log(share)).sum())


@settings(max_examples=30, deadline=None)
@given(
    chunks=st.integers(1, 4),
    size=st.integers(2, 50),
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_usage_and_perplexity_are_those_of_all_codes_seen(chunks, size, sizes, seed):
    torch.manual_seed(seed)
    health = CodebookHealth(chunks, size)
    # Skewed, so that some entries are common and some never seen.
    batches = [(torch.rand(*shape, chunks) ** 3 * size).long() for shape in sizes]
    for codes in batches:
        health.update(codes)
    together = torch.cat([codes.flatten(0, 2) for codes in batches]).numpy()
    usage, perplexity = numpy_health(together, size)
    assert health.usage()[0] == pytest.approx(usage, abs=1e-12)
    assert health.perplexity()[0] == pytest.approx(perplexity, rel=1e-9)
    for j in range(chunks):
        usage, perplexity = numpy_health(together[:, j], size)
        assert health.usage()[1][j] == pytest.approx(usage, abs=1e-12)
        assert health.perplexity()[1][j] == pytest.approx(perplexity, rel=1e-9)


def test_a_codebook_used_evenly_is_used_in_full():
    health = CodebookHealth(2, 16)
    health.update(torch.arange(16).repeat(2, 1).T.reshape(4, 2, 2, 2))
    assert health.usage() == (1.0, [1.0, 1.0])
    assert health.perplexity()[0] == pytest.approx(16)


def test_chunks_that_share_no_entry_use_more_together_than_apart():
    health = CodebookHealth(2, 8)
    health.update(torch.tensor([[0, 4], [1, 5]]).view(1, 1, 2, 2))
    assert health.usage() == (0.5, [0.25, 0.25])
    assert health.perplexity()[0] == pytest.approx(4)
    assert health.perplexity()[1] == pytest.approx([2, 2])


def test_a_codebook_never_used_has_usage_0_and_perplexity_1():
    health = CodebookHealth(3, 8)
    assert health.usage() == (0.0, [0.0] * 3)
    assert health.perplexity() == (1.0, [1.0] * 3)
