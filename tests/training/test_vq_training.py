"""Stage 1's step: one pass gives what the textbook's several passes give, and losses do not move by accident."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from movq_cli.console import Console
from movq_cli.data import pixels
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import FailureError
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.quantizers.vector import VectorQuantizer
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.runs import Run, new_manifest, start_or_resume
from movq_cli.settings import Preset
from movq_cli.training import loop, losses
from movq_cli.training.log import DeviceMetrics, Metrics
from movq_cli.training.vq import TokenizerTraining
from movq_cli.training.watch import UNWATCHED, Watch
from movq_cli.training_settings import TrainVQSettings

GOLDEN = Path(__file__).parent / "golden.json"
CPU = torch.device("cpu")


def run_steps(stage: TokenizerTraining, steps: int) -> list[float]:
    batches = stage.batches(0)
    seen = []
    for step in range(steps):
        torch.manual_seed(loop.step_seed(stage.settings.seed, step))
        seen.append(stage.step(next(batches), step)["loss"].item())
    return seen


def test_ten_steps_give_the_committed_losses(tiny: Preset, prepared: PreparedSet) -> None:
    losses_seen = run_steps(TokenizerTraining(tiny, prepared, CPU), 10)
    assert losses_seen == pytest.approx(json.loads(GOLDEN.read_text())["vq"], rel=2e-4)


def test_one_pass_gives_the_gradients_of_the_textbook_step(tiny: Preset, prepared: PreparedSet) -> None:
    """The reference: taming's formulation, with graphs retained and the adaptive weight from the last layer."""
    stage = TokenizerTraining(tiny, prepared, CPU)
    batch = next(stage.batches(0))
    reference, discriminator = Tokenizer(tiny.vq), PatchDiscriminator(8, 1)
    reference.load_state_dict(stage.model.state_dict())
    assert stage.discriminator is not None
    discriminator.load_state_dict(stage.discriminator.model.state_dict())

    originals = pixels.to_signed(batch)
    out = reference(originals)
    settings = tiny.train_vq
    nll = losses.reconstruction(out.images, originals, settings, None).total
    generator = -discriminator(out.images).mean()
    last = reference.decoder.conv_out.weight
    (nll_gradient,) = torch.autograd.grad(nll, last, retain_graph=True)
    (generator_gradient,) = torch.autograd.grad(generator, last, retain_graph=True)
    weight = (nll_gradient.norm() / (generator_gradient.norm() + 1e-4)).clamp(0, 1e4) * settings.adversarial_weight
    codes = settings.codebook_weight * out.losses["codebook"] + settings.commitment_weight * out.losses["commitment"]
    (nll + weight.detach() * generator + codes).backward()

    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({name: p.grad.clone() for name, p in stage.model.named_parameters() if p.grad is not None})

    stage.tokenizer.optimizer.register_step_pre_hook(keep)
    metrics = stage.step(batch, stage.discriminator_start)
    assert metrics["adaptive_weight"].item() == pytest.approx(weight.item() / settings.adversarial_weight, rel=1e-4)
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_discriminator_rests_until_its_start(tiny: Preset, prepared: PreparedSet) -> None:
    stage = TokenizerTraining(tiny, prepared, CPU)
    assert stage.discriminator is not None
    before = [parameter.clone() for parameter in stage.discriminator.model.parameters()]
    batch = next(stage.batches(0))
    metrics = stage.step(batch, stage.discriminator_start - 1)
    assert "discriminator" not in metrics
    assert all(torch.equal(a, b) for a, b in zip(before, stage.discriminator.model.parameters(), strict=True))
    metrics = stage.step(batch, stage.discriminator_start)
    assert "discriminator" in metrics
    assert not all(torch.equal(a, b) for a, b in zip(before, stage.discriminator.model.parameters(), strict=True))


def test_the_generators_step_leaves_no_gradient_in_the_discriminator(tiny: Preset, prepared: PreparedSet) -> None:
    stage = TokenizerTraining(tiny, prepared, CPU)
    assert stage.discriminator is not None
    recon = torch.zeros(2, 3, 16, 16, requires_grad=True)
    features = torch.randn(2, 32, 16, 16)
    assert stage.adversary is not None
    stage.adversary.gradient(recon, features, stage.model.decoder.conv_out, torch.ones_like(recon))
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in stage.discriminator.model.parameters()
    )


@pytest.mark.slow
def test_it_learns_a_handful_of_images(tiny: Preset, prepared: PreparedSet) -> None:
    settings = tiny.train_vq.model_copy(
        update={"adversarial_weight": 0.0, "base_learning_rate": 4e-4, "ema_decay": 0.0}
    )
    stage = TokenizerTraining(tiny.model_copy(update={"train_vq": settings}), prepared, CPU)
    batch = next(stage.batches(0))
    first = stage.step(batch, 0)["l1"].item()
    for step in range(1, 90):
        last = stage.step(batch, step)["l1"].item()
    assert last < first / 4


@pytest.mark.slow
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(
    tiny: Preset, prepared: PreparedSet, tmp_path: Path
) -> None:
    def train_to(folder: Path, steps: int) -> None:
        stage = TokenizerTraining(tiny, prepared, CPU)
        run = Run(folder, "vq")
        manifest = start_or_resume(
            run, new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=steps, data=prepared.manifest.hash)
        )
        loop.train(stage, run, manifest, Console(quiet=True))

    train_to(tmp_path / "whole", 10)
    train_to(tmp_path / "parts", 7)
    train_to(tmp_path / "parts", 10)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert_equal(whole["stage"], parts["stage"])
    assert (tmp_path / "whole" / "tokenizer.safetensors").read_bytes() == (
        tmp_path / "parts" / "tokenizer.safetensors"
    ).read_bytes()


def assert_equal(a: object, b: object) -> None:
    if isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert isinstance(b, list)
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    elif isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert torch.equal(a, b)
    else:
        assert a == b


def test_what_is_exported_is_the_running_average(tiny: Preset, prepared: PreparedSet, tmp_path: Path) -> None:
    stage = TokenizerTraining(tiny, prepared, CPU)
    run_steps(stage, 6)
    stage.export(tmp_path / "tokenizer.safetensors")
    from movq_cli import checkpoints

    loaded = checkpoints.load_tokenizer(tmp_path / "tokenizer.safetensors")
    assert isinstance(stage.tokenizer.average, nn.Module)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, stage.tokenizer.average.module.state_dict()[name])
        assert not torch.equal(value, stage.model.state_dict()[name])


def codebook_of(tokenizer: nn.Module) -> Tensor:
    assert isinstance(tokenizer, Tokenizer)
    assert isinstance(tokenizer.quantize, VectorQuantizer)
    return tokenizer.quantize.embedding.weight


def test_unused_codebook_entries_come_back_with_their_averages(tiny: Preset, prepared: PreparedSet) -> None:
    stage = TokenizerTraining(tiny, prepared, CPU)
    assert stage.tokenizer.average is not None
    with torch.no_grad():
        codebook_of(stage.model)[5:] = 100.0  # so far away that nothing chooses them
    batches = stage.batches(0)
    for step in range(2):
        stage.step(next(batches), step)
    assert (codebook_of(stage.model)[5:] > 50).all()
    stage.step(next(batches), 2)  # revive_every is 3
    weight = codebook_of(stage.model)
    assert weight.abs().max() < 50
    assert torch.equal(codebook_of(stage.tokenizer.average.module)[5:], weight[5:])
    moments = stage.tokenizer.optimizer.state[weight]
    assert not moments["exp_avg"][5:].any()
    assert not moments["exp_avg_sq"][5:].any()
    assert moments["exp_avg_sq"][:5].any()
    assert not stage.uses.counts.any()


@pytest.mark.parametrize(
    ("start", "step"), [(7, 7), ("50%", 30), ("0%", 0), ("2 epochs", 12), ("1 epoch", 6), ("0.5 epochs", 3)]
)
def test_the_discriminators_start_is_a_step_epochs_or_a_share_of_the_run(start: int | str, step: int) -> None:
    assert TrainVQSettings(discriminator_start=start).discriminator_step(60, 6) == step


@pytest.mark.parametrize("start", ["half", "-1", "3 steps", "50 %", "%", -2, 2.5])
def test_a_start_that_is_none_of_these_is_refused(start: object) -> None:
    with pytest.raises(ValidationError):
        TrainVQSettings.model_validate({"discriminator_start": start})


def test_the_adversarial_term_rises_along_its_ramp(tiny: Preset, prepared: PreparedSet) -> None:
    settings = tiny.train_vq.model_copy(update={"discriminator_start": "50%", "discriminator_ramp": 4})
    stage = TokenizerTraining(tiny.model_copy(update={"train_vq": settings}), prepared, CPU)
    assert stage.adversary is not None
    assert stage.adversary.start == 5
    assert [stage.adversary.ramp(step) for step in range(4, 11)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    stage = TokenizerTraining(tiny, prepared, CPU)
    assert stage.adversary is not None
    assert stage.adversary.ramp(stage.discriminator_start) == 1


@pytest.mark.slow
def test_a_run_killed_between_its_last_checkpoint_and_its_end_still_ends(
    tiny: Preset, prepared: PreparedSet, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", "vq")
    manifest = start_or_resume(
        run, new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=10, data=prepared.manifest.hash)
    )
    loop.train(TokenizerTraining(tiny, prepared, CPU), run, manifest, Console(quiet=True))
    weights = run.weights.read_bytes()
    run.weights.unlink()
    run.write(manifest.model_copy(update={"step": 5}))
    manifest = start_or_resume(
        run, new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=10, data=prepared.manifest.hash)
    )
    figures = loop.train(TokenizerTraining(tiny, prepared, CPU), run, manifest, Console(quiet=True))
    assert "psnr" in figures
    assert run.weights.read_bytes() == weights
    assert (run.read().status, run.read().step) == ("finished", 10)


def rare(tiny: Preset, **changes: object) -> Preset:
    """The tiny preset, which looks at its losses only at the end of ten steps, with other settings."""
    rest = {"log_every": 100, "checkpoint_every": 3, "validate_every": 100, "discriminator_start": 0}
    return tiny.model_copy(update={"train_vq": tiny.train_vq.model_copy(update=rest | changes)})


def train(
    preset: Preset, prepared: PreparedSet, folder: Path, steps: int, kind: type[TokenizerTraining] = TokenizerTraining
) -> TokenizerTraining:
    stage = kind(preset, prepared, CPU)
    run = Run(folder, "vq")
    manifest = start_or_resume(
        run, new_manifest(run.kind, preset_name="tiny", settings=preset, steps=steps, data=prepared.manifest.hash)
    )
    loop.train(stage, run, manifest, Console(quiet=True))
    return stage


class Overflowing(TokenizerTraining):
    """Its gradients overflow at step index 4."""

    def step(self, batch: Tensor, step: int) -> DeviceMetrics:
        last = self.model.decoder.conv_out
        assert last.bias is not None
        hook = last.bias.register_hook(lambda gradient: gradient * float("inf")) if step == 4 else None
        metrics = super().step(batch, step)
        if hook is not None:
            hook.remove()
        return metrics


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_named_with_its_batch_and_the_state_before_it_is_saved(
    tiny: Preset, prepared: PreparedSet, tmp_path: Path
) -> None:
    preset = rare(tiny, revive_every=2)
    with pytest.raises(FailureError, match=r"step 5 is not finite .*gradient_norm") as raised:
        train(preset, prepared, tmp_path / "bad", 10, Overflowing)
    report = json.loads((tmp_path / "bad" / "nonfinite.json").read_text())
    stage = TokenizerTraining(preset, prepared, CPU)
    assert report["step"] == 5
    assert report["batch"] == stage.batch_names(4)
    assert report["batch"][0] in str(raised.value)
    assert len(report["batch"]) == preset.train_vq.batch_size
    train(preset, prepared, tmp_path / "good", 4)
    bad, good = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("bad", "good"))
    assert bad["step"] == 4
    for state in (bad, good):
        state["stage"]["tokenizer"]["average"].pop("n_averaged")  # matters only while it is 0
        for part in ("tokenizer", "discriminator"):
            for group in state["stage"][part]["optimizer"]["param_groups"]:
                group.pop("lr")  # set anew at each step
    assert_equal(bad["stage"], good["stage"])


@pytest.mark.slow
def test_a_run_is_resumed_from_there_with_another_rate(tiny: Preset, prepared: PreparedSet, tmp_path: Path) -> None:
    with pytest.raises(FailureError):
        train(rare(tiny), prepared, tmp_path, 10, Overflowing)
    stage = train(rare(tiny, base_learning_rate=1e-6, clip_norm=1.0), prepared, tmp_path, 10)
    assert stage.tokenizer.optimizer.param_groups[0]["lr"] == pytest.approx(8e-6)
    assert Run(tmp_path, "vq").read().status == "finished"


def test_weights_that_are_no_longer_finite_replace_no_checkpoint(
    tiny: Preset, prepared: PreparedSet, tmp_path: Path
) -> None:
    class Spoiled(TokenizerTraining):
        def step(self, batch: Tensor, step: int) -> DeviceMetrics:
            if step == 4:
                with torch.no_grad():
                    self.model.decoder.conv_out.weight.fill_(float("nan"))
            return super().step(batch, step)

    with pytest.raises(FailureError, match="the last checkpoint stays"):
        train(rare(tiny), prepared, tmp_path, 10, Spoiled)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    assert state["stage"]["tokenizer"]["model"]["decoder.conv_out.weight"].isfinite().all()


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(
    tiny: Preset, prepared: PreparedSet, accumulate: int
) -> None:
    (whole, metrics), (parts, others) = (
        first_step(TokenizerTraining(rare(tiny, accumulate=parts, adversarial_weight=0.0), prepared, CPU))
        for parts in (1, accumulate)
    )
    assert whole
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6)
    assert others == pytest.approx(metrics, rel=1e-4)


def first_step(stage: TokenizerTraining) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients and the metrics of step 0."""
    kept: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        kept.update({name: p.grad.clone() for name, p in stage.model.named_parameters() if p.grad is not None})

    stage.tokenizer.optimizer.register_step_pre_hook(keep)
    metrics = stage.step(next(stage.batches(0)), 0)
    return kept, {name: value.item() for name, value in metrics.items()}


@pytest.mark.slow
def test_a_batch_in_parts_trains_the_discriminator_and_revives_from_all_parts(
    tiny: Preset, prepared: PreparedSet
) -> None:
    whole, parts = (
        TokenizerTraining(rare(tiny, accumulate=n, adversarial_weight=0.0, revive_every=1), prepared, CPU)
        for n in (1, 4)
    )
    for stage in (whole, parts):
        run_steps(stage, 2)
    torch.testing.assert_close(codebook_of(whole.model), codebook_of(parts.model), rtol=1e-3, atol=1e-4)
    judged = TokenizerTraining(rare(tiny, accumulate=4), prepared, CPU)
    assert judged.discriminator is not None
    before = [parameter.clone() for parameter in judged.discriminator.model.parameters()]
    run_steps(judged, 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, judged.discriminator.model.parameters(), strict=True))


@pytest.mark.slow
def test_activation_checkpointing_changes_the_memory_and_not_the_numbers(tiny: Preset, prepared: PreparedSet) -> None:
    plain, sparing = (TokenizerTraining(rare(tiny, activation_checkpointing=on), prepared, CPU) for on in (False, True))
    assert run_steps(plain, 3) == run_steps(sparing, 3)
    assert plain.model.state_dict().keys() == sparing.model.state_dict().keys()
    images = torch.randn(8, 3, 16, 16)
    assert saved_bytes(sparing.model, images) < 0.7 * saved_bytes(plain.model, images)


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    seen: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
        model(images)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.slow
def test_a_captured_step_gives_the_losses_of_the_plain_one(
    tiny: Preset, prepared: PreparedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is captured is what CUDA compiles; generating code for the CPU would take minutes.
    captured = partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", captured)
    plain, compiled = (TokenizerTraining(rare(tiny, compile=on), prepared, CPU) for on in (False, True))
    assert run_steps(compiled, 3) == pytest.approx(run_steps(plain, 3), rel=1e-4)
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()


@pytest.mark.slow
def test_the_weights_of_the_best_validation_are_saved_beside_the_last(
    tiny: Preset, prepared: PreparedSet, tmp_path: Path
) -> None:
    class BestAtFour(TokenizerTraining):
        done = 0

        def validate(self, watch: Watch = UNWATCHED, *, averaged: bool = True) -> Metrics:
            return super().validate(watch, averaged=averaged) | {"psnr": -abs(float(self.done) - 4)}

        def step(self, batch: Tensor, step: int) -> DeviceMetrics:
            self.done = step + 1
            return super().step(batch, step)

    preset = rare(tiny, validate_every=2, best_by="psnr")
    train(preset, prepared, tmp_path / "whole", 8, BestAtFour)
    train(preset, prepared, tmp_path / "four", 4, BestAtFour)
    whole, four = Run(tmp_path / "whole", "vq"), Run(tmp_path / "four", "vq")
    assert whole.best.read_bytes() == four.weights.read_bytes() != whole.weights.read_bytes()
    assert (whole.read().best_step, whole.read().best_by, whole.read().best_score) == (4, "psnr", 0)
    # A resumed run knows what was best before.
    train(preset, prepared, tmp_path / "four", 8, BestAtFour)
    assert four.best.read_bytes() == whole.best.read_bytes()
    assert four.read().best_step == 4


def test_validation_gives_the_health_of_each_chunk(tiny: Preset, prepared: PreparedSet) -> None:
    figures = TokenizerTraining(tiny, prepared, CPU).validate()
    for name, least in (("usage", 1 / tiny.vq.codebook_size), ("perplexity", 1)):
        of_chunks = figures[f"{name}_of_chunks"]
        assert isinstance(of_chunks, list)
        assert len(of_chunks) == tiny.vq.chunks
        assert min(of_chunks) >= least
    usage, usage_of_chunks = figures["usage"], figures["usage_of_chunks"]
    assert isinstance(usage, float) and isinstance(usage_of_chunks, list)
    assert usage >= max(usage_of_chunks)


@pytest.mark.slow
def test_the_log_is_written_for_machines_and_for_tensorboard(
    tiny: Preset, prepared: PreparedSet, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(rare(tiny, log_every=2, validate_every=10, checkpoint_every=10), prepared, tmp_path, 10)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    written = [line for line in lines if "training" in line]
    assert [line["step"] for line in written] == [2, 4, 6, 8, 10]
    assert all(line["images_per_second"] > 0 and 0 <= line["waiting_for_data"] <= 1 for line in written)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8, 10]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [line["training"]["loss"] for line in written], rel=1e-5
    )
    assert {"validation/psnr", "validation/usage_of_chunks/0"} <= set(events.Tags()["scalars"])
    train(rare(tiny, tensorboard=False), prepared, tmp_path / "without", 1)
    assert not (tmp_path / "without" / "tensorboard").exists()
