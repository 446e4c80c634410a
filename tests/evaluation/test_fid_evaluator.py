"""FID during training is that of `movq evaluate` on the same images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from movq_cli.commands.train_prior import train_prior
from movq_cli.commands.train_vq import train_vq
from movq_cli.commands.training import TrainRequest
from movq_cli.console import Console
from movq_cli.evaluation import distributions, extractors
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.ranks import Ranks
from tests.conftest import Movq, on_ranks

WIDTH = 6


class Projection(nn.Module):
    """A stand-in for Inception: random projections of small pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(3 * 4 * 4, WIDTH, generator=torch.Generator().manual_seed(0))
        self.seen = 0

    def forward(self, images: Tensor) -> tuple[Tensor]:
        self.seen += len(images)
        return (nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1) @ self.weight,)


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Projection:
    path = tmp_path / "weights" / WEIGHTS["inception"].file
    path.parent.mkdir()
    path.write_bytes(b"stub")
    network = Projection()
    found = extractors.Inception(network, "projection", WIDTH, path)
    monkeypatch.setattr(extractors, "load_inception", lambda *_: found)
    return network


def images(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def features(of: Tensor) -> np.ndarray:
    return Projection()(of)[0].double().numpy()


def compute_fid(ranks: Ranks, given: tuple[Tensor, Tensor, Path]) -> float:
    real, fake, path = given
    real_features = torch.from_numpy(features(real))
    evaluator = FIDEvaluator(
        extractors.Inception(Projection(), "projection", WIDTH, path),
        (real_features.mean(0), real_features.T.cov()),
        torch.device("cpu"),
        ranks,
    )
    return evaluator.fid(fake[ranks.share(len(fake))].split(50))


@pytest.mark.parametrize("world", [1, 2])
def test_it_is_the_distance_of_all_images_on_every_rank(tmp_path: Path, world: int) -> None:
    (tmp_path / "w").write_bytes(b"")
    real, fake = images(90, 0), images(101, 1)
    x, y = features(real), features(fake)
    expected = distributions.frechet_distance(
        *(torch.from_numpy(part) for part in (x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)))
    )
    found = on_ranks(compute_fid, (real, fake, tmp_path / "w"), tmp_path, world=world)
    assert found == [pytest.approx(expected, rel=1e-6)] * world


def log_of(run: Path) -> list[tuple[int, dict[str, float]]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation"]) for line in lines if "validation" in line]


def test_tokenizers_tell_their_rfid_at_intervals_and_in_the_result(
    trained: Path, inception: Projection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    settings = ["train_vq.steps=5", "train_vq.evaluate_every=2", "train_vq.evaluate_images=7"]
    request = TrainRequest("tiny.yaml", settings, run=Path("runs/evaluated"), device_name="cpu")
    train_vq(request, Console(as_json=True, quiet=True))
    result = json.loads(capsys.readouterr().out)
    found = {step: figures["rfid"] for step, figures in log_of(Path("runs/evaluated")) if "rfid" in figures}
    assert sorted(found) == [2, 4, 5]
    assert result["rfid"] == found[5] > 0
    assert "psnr" in result
    assert inception.seen == 7 + 3 * 7


def test_priors_tell_the_fid_of_their_samples(
    trained: Path, inception: Projection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    settings = ["train_prior.steps=3", "train_prior.evaluate_every=3", "train_prior.evaluate_images=9"]
    tokenizer = Path("runs/tiny-vq")
    request = TrainRequest("tiny.yaml", settings, run=Path("runs/evaluated"), tokenizer=tokenizer, device_name="cpu")
    train_prior(request, Console(as_json=True, quiet=True))
    result = json.loads(capsys.readouterr().out)
    assert [figures["fid"] for _, figures in log_of(Path("runs/evaluated")) if "fid" in figures] == [result["fid"]]
    assert result["fid"] > 0


def test_without_inceptions_weights_it_is_refused_before_anything_is_trained(movq: Movq, trained: Path) -> None:
    closed = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    arguments = ["train-vq", "--preset", "tiny.yaml", "--run", "runs/new", "-o", "train_vq.evaluate_every=2"]
    done = movq(*arguments, code=2, **closed)
    assert "no weights weights-inception-2015-12-05-6726825d.pth" in done.stderr
    assert not (trained / "runs" / "new" / "checkpoint.pt").exists()
