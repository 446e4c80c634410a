"""Two ranks, real processes, compute what one process does: gradients, losses, metrics, weights. They end together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from movq_cli.data.code_cache import CodeCache, CodeCacheHeader
from movq_cli.data.shards import PreparedSet
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.settings import Preset
from movq_cli.training import loop
from movq_cli.training.prior import PriorTraining
from movq_cli.training.vq import TokenizerTraining
from tests.conftest import Work, on_ranks, start_ranks

if TYPE_CHECKING:
    from tests.conftest import Movq

CPU = torch.device("cpu")


def on_two_ranks(work: Work, argument: object, folder: Path) -> list[Any]:
    """Run `work` on two ranks and return their results."""
    return on_ranks(work, argument, folder, world=2)


@given(st.integers(0, 100), st.integers(1, 9))
def test_the_shares_are_contiguous_complete_and_even(count: int, world: int) -> None:
    shares = [list(range(count)[Ranks(rank, world).share(count)]) for rank in range(world)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def exchange(ranks: Ranks, _: object) -> dict[str, Any]:
    table = torch.arange(12.0).view(6, 2)
    indices = torch.tensor([5, 0, 3, 3, 2])
    counter = ranks.shared_counter()
    first = counter.add(3 + ranks.rank)
    ranks.wait()
    return {
        "counter": first + counter.add(0),
        "sum": ranks.sum(torch.tensor([1.0, ranks.rank])),
        "mean": ranks.mean(torch.tensor(float(ranks.rank))),
        "any": (ranks.any(False), ranks.any(ranks.rank == 1)),
        "rows": ranks.gather_rows(table[ranks.share(6)], indices),
        "from first": ranks.from_first(lambda: ["from", ranks.rank]),
        "gathered": ranks.all_gather(str(ranks.rank)),
    }


def test_every_rank_gets_the_same_results_of_an_exchange(tmp_path: Path) -> None:
    for results in on_two_ranks(exchange, None, tmp_path):
        assert results["counter"] == 7
        assert results["sum"].tolist() == [2, 1]
        assert results["mean"] == 0.5
        assert results["any"] == (False, True)
        assert torch.equal(results["rows"], torch.arange(12.0).view(6, 2)[[5, 0, 3, 3, 2]])
        assert results["from first"] == ["from", 0]
        assert results["gathered"] == ["0", "1"]


def pass_late(ranks: Ranks, _: object) -> float:
    with ranks.long_barrier() as barrier:
        time.sleep(0.5 * ranks.rank)
        barrier()
        passed = time.monotonic()
        barrier()
    return passed


def test_no_rank_passes_a_barrier_before_the_last_one_reaches_it(tmp_path: Path) -> None:
    first, last = on_two_ranks(pass_late, None, tmp_path)
    assert abs(first - last) < 0.4


def die_before_barrier(ranks: Ranks, folder: Path) -> None:
    with ranks.long_barrier() as barrier:
        if ranks.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            barrier()
        except RuntimeError as error:
            (folder / "error").write_text(str(error))
            raise


def test_a_barrier_fails_at_once_if_a_rank_has_ended(tmp_path: Path) -> None:
    for process in start_ranks(die_before_barrier, tmp_path, tmp_path, world=2):
        process.join(60)
    assert "Connection" in (tmp_path / "error").read_text()


def test_one_process_counts_alone() -> None:
    counter = SINGLE_PROCESS.shared_counter()
    assert (counter.add(3), counter.add(0), counter.add(2)) == (3, 0, 2)
    SINGLE_PROCESS.wait()


def discriminate(ranks: Ranks, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = PatchDiscriminator(channels=4, layers=2)
    share = images[ranks.share(len(images))].clone().requires_grad_()
    wrapped = ranks.wrap(model)  # Gradients are averaged only as long as the wrapper exists.
    logits = wrapped(share)
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_batch_normalization_is_over_the_images_of_all_ranks(tmp_path: Path) -> None:
    images = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    logits, gradients = discriminate(SINGLE_PROCESS, images)
    both = on_two_ranks(discriminate, images, tmp_path)
    torch.testing.assert_close(torch.cat([found for found, _ in both]), logits, rtol=1e-4, atol=1e-5)
    for _, found in both:
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def tokenizer_steps(ranks: Ranks, argument: tuple[Preset, PreparedSet]) -> dict[str, Any]:
    """Train ten steps; return the gradients of the first one, the metrics of all, a validation, and the weights."""
    settings, images = argument
    stage = TokenizerTraining(settings, images, CPU, ranks=ranks)
    gradients: dict[str, Tensor] = {}
    assert stage.discriminator is not None
    for trained in (stage.tokenizer, stage.discriminator):

        def record(*_: object, model: torch.nn.Module = trained.model) -> None:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients.setdefault(f"{type(model).__name__}.{name}", parameter.grad.clone())

        trained.optimizer.register_step_pre_hook(record)
    batches = stage.batches(0)
    metrics = []
    for step in range(10):
        torch.manual_seed(loop.step_seed(0, step))
        of_step = stage.step(next(batches), step)
        metrics.append({name: ranks.mean(value.clone()).item() for name, value in of_step.items()})
    validation = stage.validate()
    return {"gradients": gradients, "metrics": metrics, "validation": validation, "state": stage.model.state_dict()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_train_the_tokenizer_as_one_process_does(
    tiny: Preset, prepared: PreparedSet, tmp_path: Path, accumulate: int
) -> None:
    settings = tiny.train_vq.model_copy(update={"discriminator_start": 0, "revive_every": 3})
    preset = tiny.model_copy(update={"train_vq": settings})
    alone = tokenizer_steps(SINGLE_PROCESS, (preset, prepared))
    both = on_two_ranks(
        tokenizer_steps,
        (preset.model_copy(update={"train_vq": settings.model_copy(update={"accumulate": accumulate})}), prepared),
        tmp_path,
    )
    for name, value in both[0]["state"].items():
        assert torch.equal(value, both[1]["state"][name]), name
    assert both[0]["validation"] == both[1]["validation"]
    if accumulate > 1:  # Batch normalization and the adaptive weight then use a part of the batch at a time.
        assert both[0]["metrics"][-1]["loss"] == pytest.approx(alone["metrics"][-1]["loss"], rel=0.05)
        return
    assert any(name.startswith("PatchDiscriminator") for name in alone["gradients"])
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(both[1]["gradients"][name], gradient, rtol=2e-3, atol=2e-5, msg=name)
    # Adam amplifies the rounding errors of gradients near 0: the first steps agree closely, the last ones less so.
    for expected, found in zip(alone["metrics"][:3], both[0]["metrics"], strict=False):
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert both[0]["metrics"][-1]["loss"] == pytest.approx(alone["metrics"][-1]["loss"], rel=0.05)
    assert both[0]["validation"]["psnr"] == pytest.approx(alone["validation"]["psnr"], rel=0.05)


def prior_steps(ranks: Ranks, argument: tuple[Preset, Path]) -> dict[str, Any]:
    settings, folder = argument
    torch.manual_seed(0)
    tokenizer = Tokenizer(settings.vq).eval()
    header = CodeCacheHeader(tokenizer="t", data="d", split="train", views=20, classes=("a", "b", "c"))
    cache = CodeCache(folder, header)
    stage = PriorTraining(settings, cache, cache, tokenizer, "t", CPU, ranks)
    batches = stage.batches(0)
    losses = [ranks.mean(stage.step(next(batches), step)["loss"].clone()).item() for step in range(10)]
    return {"losses": losses, "validation": stage.validate(), "state": stage.model.state_dict()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_and_parts_train_the_prior_as_one_process_does(tiny: Preset, tmp_path: Path, accumulate: int) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "codes.npy", rng.integers(0, 16, (20, 8, 8, 4), dtype=np.uint16))
    np.save(tmp_path / "labels.npy", rng.integers(0, 3, 20))
    alone = prior_steps(SINGLE_PROCESS, (tiny, tmp_path))
    parts = tiny.model_copy(update={"train_prior": tiny.train_prior.model_copy(update={"accumulate": accumulate})})
    for found in on_two_ranks(prior_steps, (parts, tmp_path), tmp_path):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, value in alone["validation"].items():
            assert found["validation"][name] == pytest.approx(value, rel=1e-5)
        for name, value in alone["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-3, atol=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tiny: Preset, prepared: PreparedSet) -> None:
    from movq_cli.errors import BadRequestError

    with pytest.raises(BadRequestError, match=r"8 does not divide into 3 ranks.*Set it to 9"):
        TokenizerTraining(tiny, prepared, CPU, ranks=Ranks(0, 3))


def test_each_training_image_is_in_one_batch_of_one_rank_per_epoch(tiny: Preset, prepared: PreparedSet) -> None:
    def images(stage: TokenizerTraining) -> list[bytes]:
        batches = stage.batches(0)
        return [image.numpy().tobytes() for _ in range(6) for image in next(batches)]

    alone = images(TokenizerTraining(tiny, prepared, CPU))
    shared = [images(training_of_rank(tiny, prepared, rank)) for rank in (0, 1)]
    assert len(alone) == len(set(alone)) == 48
    assert sorted(shared[0] + shared[1]) == sorted(alone)


def training_of_rank(tiny: Preset, prepared: PreparedSet, rank: int) -> TokenizerTraining:
    """Return a training that reads the batches of one of two ranks, without a process group."""
    stage = TokenizerTraining(tiny, prepared, CPU)
    stage.ranks = Ranks(rank, 2)
    return stage


# --- the command line -------------------------------------------------------------------------------------------------


def weights(run: Path) -> dict[str, Tensor]:
    from movq_cli import checkpoints

    return checkpoints.load_tokenizer(run / "tokenizer.safetensors").state_dict()


def test_movq_starts_ranks_itself_and_torchrun_starts_the_same(
    movq: Movq, prepared: PreparedSet, tiny_yaml: Path, tmp_path: Path
) -> None:
    length = ["-o", "train_vq.steps=4", "-o", "train_vq.discriminator_start=2"]
    arguments = ["train-vq", "--preset", tiny_yaml, "--device", "cpu", *length, "--json"]
    one = movq(*arguments, "--run", "one")
    two = movq(*arguments, "--run", "two", "--gpus", "2")
    assert json.loads(two.stdout)["psnr"] == pytest.approx(json.loads(one.stdout)["psnr"], rel=1e-3)
    assert two.stderr.count("train-vq ") == one.stderr.count("train-vq ") == 1
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "movq_cli", "--", *map(str, arguments), "--run", "torchrun"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["psnr"] == json.loads(two.stdout)["psnr"]
    assert (tmp_path / "two" / "tokenizer.safetensors").read_bytes() == (
        tmp_path / "torchrun" / "tokenizer.safetensors"
    ).read_bytes()


def test_a_refused_request_is_one_line_with_its_exit_code_on_several_ranks(
    movq: Movq, trained: Path, tiny_yaml: Path
) -> None:
    done = movq("train-vq", "--preset", tiny_yaml, "--gpus", "2", "--device", "cpu", "-o", "train_vq.seed=9", code=2)
    assert done.stderr.count("error:") == 1
    assert "train_vq.seed: 0 before, 9 now" in done.stderr
    assert "Name another folder" in done.stderr
    done = movq("train-vq", "--preset", tiny_yaml, "--gpus", "2", code=2)
    assert "--device cpu" in done.stderr


def start(folder: Path, preset: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "movq_cli", "train-vq", "--preset", preset, "--device", "cpu", "--gpus", "2", *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


LONG = ["-o", "train_vq.steps=100000", "-o", "train_vq.checkpoint_every=3", "-o", "train_vq.validate_every=100000"]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "to"), [(signal.SIGTERM, "the launcher"), (signal.SIGUSR1, "the launcher"), (signal.SIGINT, "everyone")]
)
def test_ranks_stop_together_and_keep_a_checkpoint(
    prepared: PreparedSet, tiny_yaml: Path, tmp_path: Path, number: signal.Signals, to: str
) -> None:
    process = start(tmp_path, tiny_yaml, "--run", "run", *LONG)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    if to == "everyone":  # This is what a terminal does.
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.count("error: stopped at step") == 1
    assert "Traceback" not in errors
    step = int(re.search(r"stopped at step (\d+)", errors)[1])  # type: ignore[index]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == step


def test_when_a_rank_is_killed_the_others_end_and_the_run_can_be_resumed(
    movq: Movq, prepared: PreparedSet, tiny_yaml: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, tiny_yaml, "--run", "run", *LONG)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    assert errors.count("error:") == 1
    assert re.search(r"rank \d was ended by signal 9", errors)
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    done = movq("train-vq", "--preset", tiny_yaml, "--run", "run", "-o", f"train_vq.steps={step + 2}")
    assert f"resuming from step {step}" in done.stderr


def test_a_run_folder_in_use_is_refused_to_another_command(
    movq: Movq, prepared: PreparedSet, tiny_yaml: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, tiny_yaml, "--run", "run", *LONG)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    done = movq("train-vq", "--preset", tiny_yaml, "--run", "run", *LONG, code=2)
    assert re.search(r"another movq train-vq \(process \d+\) is at work in run\.", done.stderr)
    # Ranks whose launcher is killed write a checkpoint, end, and release the folder.
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert "error: stopped at step" in errors
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    done = movq("train-vq", "--preset", tiny_yaml, "--run", "run", "-o", f"train_vq.steps={step + 1}")
    assert f"resuming from step {step}" in done.stderr
