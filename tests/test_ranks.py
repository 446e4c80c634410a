"""Two real processes do what one does: the same gradients, losses, figures and weights; and they end together."""

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
from tests.conftest import Work, on_ranks, start_ranks
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

if TYPE_CHECKING:
    from tests.conftest import Movq

CPU = torch.device("cpu")


def on_two_ranks(work: Work, given: object, folder: Path) -> list[Any]:
    """What `work` returns on each of two ranks."""
    return on_ranks(work, given, folder, world=2)


@given(st.integers(0, 100), st.integers(1, 9))
def test_the_shares_are_everything_once_in_order_and_even(count: int, world: int) -> None:
    shares = [list(range(count)[Ranks(number, world).share(count)]) for number in range(world)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def collect(mine: Ranks, _: object) -> dict[str, Any]:
    table = torch.arange(12.0).view(6, 2)
    places = torch.tensor([5, 0, 3, 3, 2])
    counter = mine.shared_counter()
    first = counter.add(3 + mine.rank)
    mine.wait()
    return {
        "counter": first + counter.add(0),
        "sum": mine.sum(torch.tensor([1.0, mine.rank])),
        "mean": mine.mean(torch.tensor(float(mine.rank))),
        "any": (mine.any(False), mine.any(mine.rank == 1)),
        "rows": mine.gather_rows(table[mine.share(6)], places),
        "made": mine.from_first(lambda: ["made", mine.rank]),
    }


def test_what_ranks_exchange(tmp_path: Path) -> None:
    for found in on_two_ranks(collect, None, tmp_path):
        assert found["counter"] == 7
        assert found["sum"].tolist() == [2, 1]
        assert found["mean"] == 0.5
        assert found["any"] == (False, True)
        assert torch.equal(found["rows"], torch.arange(12.0).view(6, 2)[[5, 0, 3, 3, 2]])
        assert found["made"] == ["made", 0]


def late(mine: Ranks, _: object) -> float:
    with mine.long_barrier() as barrier:
        time.sleep(0.5 * mine.rank)
        barrier()
        here = time.monotonic()
        barrier()
    return here


def test_nobody_leaves_a_meeting_before_the_last_has_come(tmp_path: Path) -> None:
    first, last = on_two_ranks(late, None, tmp_path)
    assert abs(first - last) < 0.4


def lost(mine: Ranks, folder: Path) -> None:
    with mine.long_barrier() as barrier:
        if mine.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            barrier()
        except RuntimeError as error:
            (folder / "told").write_text(str(error))
            raise


def test_a_meeting_ends_at_once_where_a_rank_is_lost(tmp_path: Path) -> None:
    for process in start_ranks(lost, tmp_path, tmp_path, world=2):
        process.join(60)
    assert "Connection" in (tmp_path / "told").read_text()


def test_one_process_counts_alone() -> None:
    counter = SINGLE_PROCESS.shared_counter()
    assert (counter.add(3), counter.add(0), counter.add(2)) == (3, 0, 2)
    SINGLE_PROCESS.wait()


def judge(mine: Ranks, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = PatchDiscriminator(channels=4, layers=2)
    mine_images = images[mine.share(len(images))].clone().requires_grad_()
    wrapped = mine.wrap(model)  # gradients are averaged only as long as it lives
    logits = wrapped(mine_images)
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_batch_normalization_is_over_the_images_of_all_ranks(tmp_path: Path) -> None:
    images = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    logits, gradients = judge(SINGLE_PROCESS, images)
    both = on_two_ranks(judge, images, tmp_path)
    torch.testing.assert_close(torch.cat([found for found, _ in both]), logits, rtol=1e-4, atol=1e-5)
    for _, found in both:
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def tokenizer_steps(mine: Ranks, given: tuple[Preset, PreparedSet]) -> dict[str, Any]:
    """Gradients of a step with all losses, then ten steps' losses, figures and weights."""
    preset, images = given
    stage = TokenizerTraining(preset, images, CPU, ranks=mine)
    gradients: dict[str, Tensor] = {}
    assert stage.discriminator is not None
    for trained in (stage.tokenizer, stage.discriminator):

        def keep(*_: object, model: torch.nn.Module = trained.model) -> None:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients.setdefault(f"{type(model).__name__}.{name}", parameter.grad.clone())

        trained.optimizer.register_step_pre_hook(keep)
    batches = stage.batches(0)
    seen = []
    for step in range(10):
        torch.manual_seed(loop.step_seed(0, step))
        metrics = stage.step(next(batches), step)
        seen.append({name: mine.mean(value.clone()).item() for name, value in metrics.items()})
    return {"gradients": gradients, "metrics": seen, "figures": stage.validate(), "state": stage.model.state_dict()}


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
    assert both[0]["figures"] == both[1]["figures"]
    if accumulate > 1:  # batch normalization and the adaptive weight then see a part of the batch at a time
        assert both[0]["metrics"][-1]["loss"] == pytest.approx(alone["metrics"][-1]["loss"], rel=0.05)
        return
    assert any(name.startswith("PatchDiscriminator") for name in alone["gradients"])
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(both[1]["gradients"][name], gradient, rtol=2e-3, atol=2e-5, msg=name)
    # Adam makes much of what rounding leaves of a gradient near 0: the first steps agree closely, the last well.
    for expected, found in zip(alone["metrics"][:3], both[0]["metrics"], strict=False):
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert both[0]["metrics"][-1]["loss"] == pytest.approx(alone["metrics"][-1]["loss"], rel=0.05)
    assert both[0]["figures"]["psnr"] == pytest.approx(alone["figures"]["psnr"], rel=0.05)


def prior_steps(mine: Ranks, given: tuple[Preset, Path]) -> dict[str, Any]:
    preset, folder = given
    torch.manual_seed(0)
    tokenizer = Tokenizer(preset.vq).eval()
    header = CodeCacheHeader(tokenizer="t", data="d", split="train", views=20, classes=("a", "b", "c"))
    cache = CodeCache(folder, header)
    stage = PriorTraining(preset, cache, cache, tokenizer, "t", CPU, mine)
    batches = stage.batches(0)
    losses = [mine.mean(stage.step(next(batches), step)["loss"].clone()).item() for step in range(10)]
    return {"losses": losses, "figures": stage.validate(), "state": stage.model.state_dict()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_and_parts_train_the_prior_as_one_process_does(tiny: Preset, tmp_path: Path, accumulate: int) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "codes.npy", rng.integers(0, 16, (20, 8, 8, 4), dtype=np.uint16))
    np.save(tmp_path / "labels.npy", rng.integers(0, 3, 20))
    alone = prior_steps(SINGLE_PROCESS, (tiny, tmp_path))
    parts = tiny.model_copy(update={"train_prior": tiny.train_prior.model_copy(update={"accumulate": accumulate})})
    for found in on_two_ranks(prior_steps, (parts, tmp_path), tmp_path):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, value in alone["figures"].items():
            assert found["figures"][name] == pytest.approx(value, rel=1e-5)
        for name, value in alone["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-3, atol=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tiny: Preset, prepared: PreparedSet) -> None:
    from movq_cli.errors import BadRequestError

    with pytest.raises(BadRequestError, match=r"8 does not divide into 3 ranks.*Set it to 9"):
        TokenizerTraining(tiny, prepared, CPU, ranks=Ranks(0, 3))


def test_every_training_image_is_seen_once_an_epoch_by_one_of_the_ranks(tiny: Preset, prepared: PreparedSet) -> None:
    def images(stage: TokenizerTraining) -> list[bytes]:
        batches = stage.batches(0)
        return [image.numpy().tobytes() for _ in range(6) for image in next(batches)]

    alone = images(TokenizerTraining(tiny, prepared, CPU))
    shared = [images(stage) for stage in (of_rank(tiny, prepared, 0), of_rank(tiny, prepared, 1))]
    assert len(alone) == len(set(alone)) == 48
    assert sorted(shared[0] + shared[1]) == sorted(alone)


def of_rank(tiny: Preset, prepared: PreparedSet, number: int) -> TokenizerTraining:
    """Rank `number` of two, as far as its data goes: no process group is joined."""
    stage = TokenizerTraining(tiny, prepared, CPU)
    stage.ranks = Ranks(number, 2)
    return stage


# --- the command line -------------------------------------------------------------------------------------------------


def weights(run: Path) -> dict[str, Tensor]:
    from movq_cli import checkpoints

    return checkpoints.load_tokenizer(run / "tokenizer.safetensors").state_dict()


def test_movq_starts_ranks_itself_and_torchrun_starts_the_same(
    movq: Movq, shapes: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    movq("prepare", shapes, "data", "--size", "16", "--val", "12")
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


def test_ranks_that_are_refused_end_with_one_line_and_the_right_code(
    movq: Movq, trained: Path, tiny_yaml: Path
) -> None:
    done = movq("train-vq", "--preset", tiny_yaml, "--gpus", "2", "--device", "cpu", "-o", "train_vq.seed=9", code=2)
    assert done.stderr.count("error:") == 1
    assert "train_vq.seed: 0 there, 9 now" in done.stderr
    assert "Name another folder" in done.stderr
    done = movq("train-vq", "--preset", tiny_yaml, "--gpus", "2", code=2)
    assert "--device cpu" in done.stderr


def start(folder: Path, preset: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "movq_cli", "train-vq", "--preset", preset, "--device", "cpu", "--gpus", "2", *more],
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to", ["the launcher", "everyone"])
def test_ranks_stop_together_and_keep_a_checkpoint(
    movq: Movq, shapes: Path, tiny_yaml: Path, tmp_path: Path, number: signal.Signals, to: str
) -> None:
    movq("prepare", shapes, "data", "--size", "16", "--val", "12")
    process = start(tmp_path, tiny_yaml, "--run", "run", *LONG)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    if to == "everyone":  # as a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.count("error: stopped at step") == 1
    assert "Traceback" not in errors
    step = int(re.search(r"stopped at step (\d+)", errors)[1])  # type: ignore[index]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == step


def test_when_a_rank_is_killed_the_others_end_and_the_run_can_go_on(
    movq: Movq, shapes: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    movq("prepare", shapes, "data", "--size", "16", "--val", "12")
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
    assert f"going on from step {step}" in done.stderr


def test_a_folder_in_which_a_run_is_at_work_is_refused_to_another(
    movq: Movq, shapes: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    movq("prepare", shapes, "data", "--size", "16", "--val", "12")
    process = start(tmp_path, tiny_yaml, "--run", "run", *LONG)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    done = movq("train-vq", "--preset", tiny_yaml, "--run", "run", *LONG, code=2)
    assert "another movq train-vq is at work in run" in done.stderr
    # Ranks whose launcher is killed end too, with a checkpoint, and leave the folder to others.
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert "error: stopped at step" in errors
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    done = movq("train-vq", "--preset", tiny_yaml, "--run", "run", "-o", f"train_vq.steps={step + 1}")
    assert f"going on from step {step}" in done.stderr
