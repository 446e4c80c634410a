"""The transformer against an implementation in numpy, and who sees whom."""

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn

from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.models.transformer import INIT_STD, Block
from movq_cli.settings import CodeShape, PriorSettings

SHAPE = CodeShape(height=2, width=3, chunks=2, codebook_size=7)
SETTINGS = PriorSettings(layers=2, heads=3, width=12, hidden=20)


def random_model(classes=0, seed=0):
    """In float64, every parameter of a size at which it matters."""
    torch.manual_seed(seed)
    model = MaskedPrior(SETTINGS.model_copy(update={"classes": classes}), SHAPE).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def random_codes(batch=2):
    return torch.randint(0, SHAPE.codebook_size + 1, (batch, SHAPE.height, SHAPE.width, SHAPE.chunks))


def layer_norm(x, weights, name):
    away = x - x.mean(-1, keepdims=True)
    normal = away / np.sqrt((away**2).mean(-1, keepdims=True) + 1e-5)
    return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def block_by_hand(x, weights, heads, prefix=""):
    """One sequence [N, W]; softmax and GELU from their definitions."""
    width = x.shape[1]
    size = width // heads
    joined = linear(layer_norm(x, weights, prefix + "norm1"), weights, prefix + "qkv")
    attended = np.zeros_like(x)
    for head in range(heads):
        q, k, v = (joined[:, part * width + head * size :][:, :size] for part in range(3))
        weight = np.exp(q @ k.T / np.sqrt(size))
        attended[:, head * size : (head + 1) * size] = weight / weight.sum(1, keepdims=True) @ v
    x = x + linear(attended, weights, prefix + "proj")
    hidden = linear(layer_norm(x, weights, prefix + "norm2"), weights, prefix + "mlp.0")
    return x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, weights, prefix + "mlp.2")


def model_by_hand(model, codes, label):
    """One image's logits, [h, w, c, K]."""
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    tokens = [
        np.concatenate([weights["table.weight"][codes[i, j, k]] for k in range(SHAPE.chunks)])
        for i in range(SHAPE.height)
        for j in range(SHAPE.width)
    ]
    if label is not None:
        tokens.append(np.concatenate([weights["table.weight"][label]] * SHAPE.chunks))
    x = np.stack(tokens) + weights["position"][0]
    for layer in range(SETTINGS.layers):
        x = block_by_hand(x, weights, SETTINGS.heads, f"blocks.{layer}.")
    x = layer_norm(x, weights, "norm")
    out = np.zeros((SHAPE.height, SHAPE.width, SHAPE.chunks, SHAPE.codebook_size))
    for i in range(SHAPE.height):
        for j in range(SHAPE.width):
            for c in range(SHAPE.chunks):
                rows = weights["head.weight"][c * SHAPE.codebook_size : (c + 1) * SHAPE.codebook_size]
                out[i, j, c] = rows @ x[i * SHAPE.width + j]
    return out


@pytest.mark.parametrize(("classes", "parameters"), [(0, 307_030_272), (1000, 307_031_296)])
def test_the_papers_prior_has_its_parameters(classes, parameters):
    with torch.device("meta"):
        shape = CodeShape(height=16, width=16, chunks=4, codebook_size=1024)
        model = MaskedPrior(PriorSettings(classes=classes), shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(parameter.numel() for parameter in model.blocks[0].parameters()) == 12_596_224
    assert model.table.weight.shape == (1025, 256)
    assert model.head.weight.shape == (4096, 1024)
    assert model.position.shape == (1, 257 if classes else 256, 1024)


def test_a_block_is_what_its_definition_says():
    torch.manual_seed(0)
    block = Block(SETTINGS).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    weights = {name: parameter.detach().numpy() for name, parameter in block.named_parameters()}
    expected = np.stack([block_by_hand(sequence.numpy(), weights, SETTINGS.heads) for sequence in x])
    np.testing.assert_allclose(block(x).detach(), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("classes", [0, 5])
def test_the_logits_are_what_their_definition_says(classes):
    model, codes = random_model(classes), random_codes(3)
    labels = torch.tensor([4, 0, model.unknown]) if classes else None
    logits = model(codes, labels)
    assert logits.shape == (*codes.shape, SHAPE.codebook_size)
    for image in range(3):
        label = labels[image].item() if labels is not None else None
        expected = model_by_hand(model, codes[image].numpy(), label)
        np.testing.assert_allclose(logits[image].detach(), expected, atol=1e-10, rtol=1e-10)


def test_every_code_influences_every_position_and_chunk():
    model, codes = random_model(), random_codes(1)
    logits = model(codes)
    for place in range(SHAPE.codes):
        changed = codes.clone().flatten()
        changed[place] = (changed[place] + 1) % (SHAPE.codebook_size + 1)
        moved = (model(changed.view(codes.shape)) - logits).abs().amax(-1)
        assert moved.min() > 1e-6


def test_swapping_the_chunks_of_a_position_or_two_positions_matters():
    model, codes = random_model(), random_codes(1)
    codes[0, 0, 0] = torch.tensor([1, 2])
    codes[0, 1, 1] = torch.tensor([3, 4])
    chunks, positions = codes.clone(), codes.clone()
    chunks[0, 0, 0] = codes[0, 0, 0].flip(0)
    positions[0, 0, 0], positions[0, 1, 1] = codes[0, 1, 1], codes[0, 0, 0]
    assert (model(chunks) - model(codes)).abs().amax((-1, -2)).min() > 1e-6
    assert (model(positions) - model(codes)).abs().amax((-1, -2)).min() > 1e-6


def test_the_class_influences_every_logit_and_has_no_logits_of_its_own():
    model, codes = random_model(classes=5), random_codes(1).repeat(6, 1, 1, 1)
    logits = model(codes, torch.tensor([0, 1, 2, 3, 4, model.unknown]))
    assert logits.shape == (*codes.shape, SHAPE.codebook_size)
    for one in range(6):
        for other in range(one):
            assert (logits[one] - logits[other]).abs().amax(-1).min() > 1e-6


def test_unknown_codes_and_the_unknown_class_read_the_last_row_of_the_table():
    model, codes = random_model(classes=5), torch.randint(0, SHAPE.codebook_size, (3, 2, 3, 2))
    codes[1, 0, 1, 1] = model.unknown
    labels = torch.tensor([1, 1, model.unknown])
    before = model(codes, labels)
    with torch.no_grad():
        model.table.weight[model.unknown].normal_()
    moved = (model(codes, labels) - before).abs().amax(-1)
    assert moved[0].max() == 0
    assert moved[1].min() > 1e-6
    assert moved[2].min() > 1e-6


def test_an_images_logits_do_not_depend_on_its_batch():
    model, codes = random_model(classes=5), random_codes(4)
    labels = torch.tensor([0, 3, 1, model.unknown])
    torch.testing.assert_close(model(codes, labels)[2:3], model(codes[2:3], labels[2:3]), atol=1e-12, rtol=1e-12)


def test_a_row_of_the_head_is_one_code_of_one_chunk():
    model, codes = random_model(), random_codes(2)
    logits = model(codes)
    size = SHAPE.codebook_size
    for row in range(SHAPE.chunks * size):
        with torch.no_grad():
            model.head.weight[row] += 1
        moved = (model(codes) - logits).abs()
        with torch.no_grad():
            model.head.weight[row] -= 1
        others = moved.clone()
        others[..., row // size, row % size] = 0
        assert moved[..., row // size, row % size].min() > 0
        assert others.max() < 1e-12


def test_it_starts_small_so_that_every_code_is_about_as_likely():
    torch.manual_seed(0)
    shape = CodeShape(height=4, width=4, chunks=4, codebook_size=64)
    model = MaskedPrior(PriorSettings(layers=2, heads=4, width=128, hidden=256), shape)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight")))
        elif name.endswith("bias"):
            assert parameter.count_nonzero() == 0
        else:
            spread = 5 * INIT_STD / np.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(INIT_STD, abs=spread)
            assert abs(parameter.mean().item()) < 5 * INIT_STD / np.sqrt(parameter.numel())
    codes = torch.randint(0, 65, (2, 4, 4, 4))
    assert model(codes).softmax(-1).max() < 4 / 64
