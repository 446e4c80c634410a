"""Stage 2's step: it learns what it is shown, draws it back, and its losses do not move by accident."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from movq_cli.console import Console
from movq_cli.data.code_cache import CodeCache, CodeCacheHeader
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.runs import Run, new_manifest, start_or_resume
from movq_cli.settings import Preset, SampleSettings
from movq_cli.training import loop
from movq_cli.training.prior import PriorTraining, parameter_groups

GOLDEN = Path(__file__).parent / "golden.json"
CPU = torch.device("cpu")


def cache(folder: Path, tiny: Preset, number: int, seed: int = 0) -> CodeCache:
    """Random codes with labels, as `movq train-prior` would have encoded them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shape = (number, *tiny.vq.code_shape.size)
    np.save(folder / "codes.npy", rng.integers(0, tiny.vq.codebook_size, shape, dtype=np.uint16))
    np.save(folder / "labels.npy", rng.integers(0, 3, number))
    header = CodeCacheHeader(tokenizer="t", data="d", split="train", views=number, classes=("a", "b", "c"))
    return CodeCache(folder, header)


def stage_of(tiny: Preset, folder: Path, number: int = 24) -> PriorTraining:
    torch.manual_seed(0)
    tokenizer = Tokenizer(tiny.vq).eval()
    return PriorTraining(tiny, cache(folder / "t", tiny, number), cache(folder / "v", tiny, 5, 1), tokenizer, "t", CPU)


def in_mode(preset: Preset, mode: str) -> Preset:
    return preset.model_copy(update={"prior": preset.prior.model_copy(update={"mode": mode, "layers": 3})})


def test_ten_steps_give_the_committed_losses(tiny: Preset, tmp_path: Path) -> None:
    stage = stage_of(tiny, tmp_path)
    batches = stage.batches(0)
    losses = [stage.step(next(batches), step)["loss"].item() for step in range(10)]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["prior"], rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "repeats", "training_steps", "decoding_steps"),
    [("mask", 4, 500, (1, 4, 8)), ("auto", 1, 300, (1,)), ("depth", 1, 300, (1,))],
)
def test_a_prior_overfits_three_code_maps_and_draws_them_exactly(
    tiny: Preset, tmp_path: Path, mode: str, repeats: int, training_steps: int, decoding_steps: tuple[int, ...]
) -> None:
    settings = tiny.train_prior.model_copy(
        update={
            "base_learning_rate": 5e-4,
            "label_smoothing": 0.0,
            "label_dropout": 0.0,
            "ema_decay": 0.0,
            "batch_size": 3 * repeats,
        }
    )
    preset = in_mode(tiny.model_copy(update={"train_prior": settings}), mode)
    stage = stage_of(preset, tmp_path)
    codes = torch.from_numpy(stage.training.codes[:3].astype(np.int64))
    classes = torch.arange(3)
    for step in range(training_steps):
        stage.step((codes.repeat(repeats, 1, 1, 1), classes.repeat(repeats)), step)
    for steps in decoding_steps:
        drawn = stage.prior.exported.decode(range(9), classes.repeat(3), SampleSettings(steps=steps, temperature=0.1))
        assert torch.equal(drawn, codes.repeat(3, 1, 1, 1))


@pytest.mark.parametrize("mode", ["mask", "auto", "depth"])
def test_the_first_loss_is_that_of_a_uniform_guess_overall_and_in_every_part(
    tiny: Preset, tmp_path: Path, mode: str
) -> None:
    figures = stage_of(in_mode(tiny, mode), tmp_path).validate()
    guess = np.log(tiny.vq.codebook_size)
    assert figures["loss"] == pytest.approx(guess, rel=0.01)
    assert figures["loss_of_channels"] == pytest.approx([guess] * tiny.vq.chunks, rel=0.02)
    if mode == "mask":
        loss_by_share = figures["loss_by_masked_share"]
        assert isinstance(loss_by_share, list)
        shares = [nats for nats in loss_by_share if nats]  # of 5 images not every fifth has one
        assert shares == pytest.approx([guess] * len(shares), rel=0.05)
    else:
        assert figures["bits_per_code"] == pytest.approx(np.log2(tiny.vq.codebook_size), rel=0.01)


def test_validation_is_the_same_each_time_and_draws_nothing_from_training(tiny: Preset, tmp_path: Path) -> None:
    stage = stage_of(tiny, tmp_path)
    assert stage.validate() == stage.validate()
    batches = stage.batches(0)
    first = [stage.step(next(batches), step)["loss"].item() for step in range(4)]
    other = stage_of(tiny, tmp_path / "again")
    batches = other.batches(0)
    second = []
    for step in range(4):
        other.validate()
        second.append(other.step(next(batches), step)["loss"].item())
    assert first == second


def entropy(codes: np.ndarray) -> float:
    _, counts = np.unique(codes, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def test_the_unigram_entropies_are_those_of_the_validation_codes(tiny: Preset, tmp_path: Path) -> None:
    stage = stage_of(tiny, tmp_path)
    codes = np.asarray(stage.validation.codes)
    of_chunks = [entropy(codes[..., chunk]) for chunk in range(tiny.vq.chunks)]
    metrics = stage.validate()
    assert metrics["unigram_entropy_of_chunks"] == pytest.approx(of_chunks)
    assert metrics["unigram_entropy"] == pytest.approx(np.mean(of_chunks))
    assert metrics["unigram_entropy_pooled"] == pytest.approx(entropy(codes))


def test_chunks_that_use_different_entries_have_a_larger_pooled_entropy(tiny: Preset, tmp_path: Path) -> None:
    stage = stage_of(tiny, tmp_path)
    chunks = tiny.vq.chunks
    stage.validation.codes = np.zeros_like(stage.validation.codes)
    stage.validation.codes += np.arange(chunks, dtype=np.uint16)
    metrics = stage.validate()
    assert metrics["unigram_entropy"] == 0
    assert metrics["unigram_entropy_pooled"] == pytest.approx(np.log(chunks))


def test_only_matrices_decay(tiny: Preset, tmp_path: Path) -> None:
    stage = stage_of(tiny, tmp_path)
    decayed, plain = parameter_groups(stage.model, 0.01)
    names = {id(parameter): name for name, parameter in stage.model.named_parameters()}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decayed["params"])
    assert {names[id(p)] for p in plain["params"]} >= {"table.weight", "position", "norm.weight", "blocks.0.qkv.bias"}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)


def test_labels_are_dropped_at_the_rate_of_the_setting(tiny: Preset, tmp_path: Path) -> None:
    stage = stage_of(tiny, tmp_path)
    stage.generator.manual_seed(0)
    dropped = stage._dropped_classes(20_000)
    assert dropped.float().mean().item() == pytest.approx(tiny.train_prior.label_dropout, abs=0.01)


def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(tiny: Preset, tmp_path: Path) -> None:
    def train_to(name: str, steps: int, again: str = "") -> None:
        stage = stage_of(tiny, tmp_path / f"codes-{name}{again}")
        run = Run(tmp_path / name, "prior")
        manifest = start_or_resume(
            run, new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=steps, data="d", tokenizer="t")
        )
        loop.train(stage, run, manifest, Console(quiet=True))

    train_to("whole", 10)
    train_to("parts", 6)
    train_to("parts", 10, "again")
    whole, parts = ((tmp_path / name / "prior.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
