"""The transformer with QK-norm and dropout: attention by hand, the KV cache, and what training drops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from movq_cli import devices, runs
from movq_cli.errors import BadRequestError
from movq_cli.models import priors
from movq_cli.models.transformer import Block
from movq_cli.runs import Run
from movq_cli.settings import CodeShape, Preset, PriorSettings, SampleSettings
from movq_cli.training import cost
from tests.models.test_autoregressive_prior import logits_seen

SHAPE = CodeShape(height=3, width=4, chunks=2, codebook_size=11)
MODES = ["mask", "auto", "depth"]


def settings_of(mode: str = "mask", *, qk_norm: bool = True, dropout: float = 0.0, classes: int = 0) -> PriorSettings:
    return PriorSettings(
        mode=mode, layers=3, heads=2, width=16, hidden=24, classes=classes, qk_norm=qk_norm, dropout=dropout
    )


def random_model(settings: PriorSettings) -> priors.CodePrior:
    torch.manual_seed(0)
    model = priors.build(settings, SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def random_codes(images: int = 3) -> Tensor:
    return torch.randint(0, SHAPE.codebook_size, (images, *SHAPE.size), generator=torch.Generator().manual_seed(1))


def unit(values: list[float], scale: list[float]) -> list[float]:
    """Return a vector of root mean square 1, times a scale."""
    size = math.sqrt(sum(value * value for value in values) / len(values) + 1e-6)
    return [value / size * factor for value, factor in zip(values, scale, strict=True)]


def test_attention_with_qk_norm_is_what_its_definition_says() -> None:
    torch.manual_seed(0)
    block = Block(settings_of()).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    nn.init.zeros_(block.mlp[2].get_parameter("weight"))
    nn.init.zeros_(block.mlp[2].get_parameter("bias"))
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    rows = block.qkv(block.norm1(x))[0].tolist()
    attended = torch.zeros(5, 16, dtype=torch.float64)
    for head in range(2):
        first = 8 * head
        queries = [unit(row[first : first + 8], block.q_norm.weight.tolist()) for row in rows]
        keys = [unit(row[16 + first : 24 + first], block.k_norm.weight.tolist()) for row in rows]
        for token, query in enumerate(queries):
            weights = [math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(8)) for key in keys]
            for row, weight in zip(rows, weights, strict=True):
                value = torch.tensor(row[32 + first : 40 + first], dtype=torch.float64)
                attended[token, first : first + 8] += weight / sum(weights) * value
    expected = x[0] + block.proj(attended)
    torch.testing.assert_close(block(x)[0], expected, rtol=1e-10, atol=1e-10)


def test_the_logits_of_attention_stay_bounded_however_large_the_weights_become() -> None:
    block, x = Block(settings_of()), torch.randn(2, 5, 16)
    with torch.no_grad():
        block.qkv.weight.mul_(1e4)
        q, k, _ = block._project(x)
    assert (q @ k.transpose(-1, -2) / math.sqrt(8)).abs().max() <= math.sqrt(8) + 1e-4


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("mode", ["auto", "depth"])
def test_the_cache_gives_the_logits_of_the_full_pass_with_qk_norm(mode: str, classes: int) -> None:
    model, codes = random_model(settings_of(mode, classes=classes)), random_codes()
    labels = torch.tensor([0, 2, 1]) if classes else None
    full = model(codes, labels).flatten(1, 3)
    torch.testing.assert_close(logits_seen(model, codes, labels), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_qk_norm_adds_two_scales_to_each_block_and_dropout_adds_nothing(mode: str) -> None:
    plain, normed, dropped = (
        priors.build(settings, SHAPE).state_dict()
        for settings in (
            settings_of(mode, qk_norm=False),
            settings_of(mode),
            settings_of(mode, qk_norm=False, dropout=0.5),
        )
    )
    added = {f"blocks.{layer}.{name}_norm.weight" for layer in range(3) for name in ("q", "k")}
    assert normed.keys() - plain.keys() == added
    assert dropped.keys() == plain.keys()
    assert all(normed[name].shape == (8,) for name in added)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_changes_the_logits_of_training_and_none_of_sampling(mode: str) -> None:
    plain = random_model(settings_of(mode, qk_norm=False))
    model = random_model(settings_of(mode, qk_norm=False, dropout=0.3))
    codes, sample = random_codes(), SampleSettings(steps=3)
    assert torch.equal(model(codes), plain(codes))
    assert torch.equal(model.decode([1, 2], None, sample), plain.decode([1, 2], None, sample))
    model.train()
    torch.manual_seed(3)
    first, second = model(codes), model(codes)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(model(codes), first)


def test_dropout_drops_its_share_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    block = Block(settings_of(dropout=0.2)).train()
    nn.init.zeros_(block.mlp[2].get_parameter("weight"))
    nn.init.zeros_(block.mlp[2].get_parameter("bias"))
    nn.init.normal_(block.proj.weight)
    x = torch.randn(64, 10, 16)
    dropped = block(x) - x
    added = block.eval()(x) - x
    is_zero = dropped.abs() < 1e-6
    assert is_zero.float().mean().item() == pytest.approx(0.2, abs=0.02)
    torch.testing.assert_close(dropped[~is_zero], added[~is_zero] / 0.8, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_qk_norm_gives_the_same_codes_with_matrices_that_are_stored_in_bf16(mode: str) -> None:
    model, cpu = random_model(settings_of(mode)), torch.device("cpu")
    with devices.autocast(cpu, "bf16"):
        expected = model.decode(range(3), None, SampleSettings(steps=3))
        devices.cast_linear_layers(model, cpu, "bf16")
        found = model.decode(range(3), None, SampleSettings(steps=3))
    block = model.blocks[0]
    assert isinstance(block, Block)
    assert block.q_norm.weight.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_masks_of_dropout_count_as_memory(tiny: Preset) -> None:
    def activations(**changes: float) -> float:
        prior = tiny.prior.model_copy(update={"layers": 3, **changes})
        train = tiny.train_prior.model_copy(update={"batch_size": 512})
        return cost.of_prior(prior, tiny.vq.code_shape, train, torch.device("cpu"), 1).memory["activations"]

    assert activations(dropout=0.1) > 1.05 * activations()


def test_a_run_may_be_resumed_with_another_dropout_but_not_with_qk_norm(tiny: Preset, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "prior")

    def resumed(**changes: float) -> Preset:
        preset = tiny.model_copy(update={"prior": tiny.prior.model_copy(update=changes)})
        manifest = runs.new_manifest(run.kind, preset_name="tiny", settings=preset, steps=5, data="d")
        branched = runs.branch(run, 0, manifest) if run.manifest_file.exists() else manifest
        assert branched.settings == preset
        return runs.start_or_resume(run, manifest).settings

    resumed()
    assert resumed(dropout=0.2).prior.dropout == 0.2
    assert run.read().history[-1].settings == {"prior.dropout": (0.0, 0.2)}
    with pytest.raises(BadRequestError, match=r"prior\.qk_norm: False before, True now"):
        resumed(dropout=0.2, qk_norm=True)
