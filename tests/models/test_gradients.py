"""The gradient estimators and the entropy loss against closed forms and loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from movq_cli.errors import BadRequestError
from movq_cli.models import gradients
from movq_cli.models.gradients import ESTIMATORS, entropy_loss
from movq_cli.models.quantizers.vector import VectorQuantizer


def rotation(start: Tensor, end: Tensor) -> Tensor:
    """The rotation [d, d] in the plane of two unit vectors that takes the first to the second, by Rodrigues."""
    turn = torch.outer(end, start) - torch.outer(start, end)
    return torch.eye(len(start), dtype=start.dtype) + turn + turn @ turn / (1 + start @ end)


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_rotation_trick_turns_and_scales_the_gradient_of_each_chunk(chunks: int, normalized: bool) -> None:
    torch.manual_seed(chunks)
    quantizer, width = VectorQuantizer(40, 5, normalize=normalized), 5
    torch.nn.init.normal_(quantizer.embedding.weight)
    quantizer.prepare_training("rotation", None)
    z = torch.randn(2, width * chunks, 3, 2, requires_grad=True)
    out = quantizer(z)
    weight = torch.randn(z.shape)
    (gradient,) = torch.autograd.grad((out.vectors * weight).sum(), z)
    torch.testing.assert_close(out.vectors, quantizer.decode(out.codes), atol=1e-5, rtol=1e-5)
    entries = quantizer.embedding.weight.detach().double()
    for b, i, j, k in torch.cartesian_prod(*map(torch.arange, (2, 3, 2, chunks))).tolist():
        channels = slice(k * width, (k + 1) * width)
        vector = z.detach()[b, channels, i, j].double()
        entry = entries[out.codes[b, i, j, k]]
        scale = entry.norm() / vector.norm()
        if normalized:
            scale = torch.tensor(1.0)
        turn = rotation(normalize(vector, dim=0), normalize(entry, dim=0))
        expected = scale * turn.T @ weight[b, channels, i, j].double()
        if normalized:  # The vector is scaled to unit length first, whose Jacobian projects and scales.
            unit = normalize(vector, dim=0)
            expected = (expected - unit * (unit @ expected)) / vector.norm()
        torch.testing.assert_close(gradient[b, channels, i, j].double(), expected, atol=2e-5, rtol=2e-5)
    assert quantizer.embedding.weight.grad is None


def test_vectors_of_length_0_and_opposite_entries_have_finite_gradients() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    vectors = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    out = gradients.rotate(z, vectors)
    out.sum().backward()
    assert z.grad is not None
    assert out.isfinite().all()
    assert z.grad.isfinite().all()
    torch.testing.assert_close(out[1], vectors[1])


def entropy_by_loops(rows: Tensor, entries: Tensor, temperature: float) -> Tensor:
    """E[H(p)] - H(E[p]) with all distances written out, one vector after the other."""
    certainties, total = [], torch.zeros(len(entries), dtype=rows.dtype)
    for row in rows:
        weights = torch.exp(-((row - entries) ** 2).sum(1) / temperature)
        share = weights / weights.sum()
        certainties.append(-sum(p * torch.log(p) for p in share))
        total = total + share
    mean = total / len(rows)
    return torch.stack(certainties).mean() + sum(p * torch.log(p) for p in mean)


@pytest.mark.parametrize("chunks", [1, 3, 8])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_entropy_loss_and_its_gradients_are_those_of_loops(chunks: int, temperature: float) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 2)
    torch.nn.init.normal_(quantizer.embedding.weight)
    quantizer.prepare_training("straight-through", temperature)
    z = torch.randn(1, 2 * chunks, 2, 3, requires_grad=True)
    loss = quantizer(z).losses["entropy"]
    loss.backward()
    exact = z.detach().double().requires_grad_()
    entries = quantizer.embedding.weight.detach().double().requires_grad_()
    rows = torch.stack([exact[0, 2 * k : 2 * k + 2, i, j] for i in range(2) for j in range(3) for k in range(chunks)])
    expected = entropy_by_loops(rows, entries, temperature)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert z.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(z.grad.double(), exact.grad, atol=1e-6, rtol=1e-4)
    assert quantizer.embedding.weight.grad is not None
    torch.testing.assert_close(quantizer.embedding.weight.grad.double(), entries.grad, atol=1e-6, rtol=1e-4)


def test_the_entropy_loss_is_between_minus_log_k_and_0() -> None:
    entries = torch.eye(8)
    assert entropy_loss(entries, entries, 0.01).item() == pytest.approx(-math.log(8), abs=1e-5)
    assert entropy_loss(entries[:1].expand(5, 8), entries, 0.01).item() == pytest.approx(0, abs=1e-5)


def test_without_an_entropy_loss_there_are_the_two_losses_of_the_paper() -> None:
    assert list(VectorQuantizer(4, 2)(torch.randn(1, 2, 2, 2)).losses) == ["codebook", "commitment"]
    assert list(ESTIMATORS) == ["straight-through", "rotation"]


def test_a_quantizer_without_distances_refuses_both() -> None:
    from movq_cli.models.quantizers.logit import LogitQuantizer

    quantizer = LogitQuantizer(4, 2)
    quantizer.prepare_training("straight-through", None)
    for arguments in (("rotation", None), ("straight-through", 0.1)):
        with pytest.raises(BadRequestError, match="no distances") as raised:
            quantizer.prepare_training(*arguments)
        assert "quantizer_gradient=straight-through" in str(raised.value.hint)
