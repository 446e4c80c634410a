"""`movq evaluate --codes`: its values on a trained tokenizer, and what it says where something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from movq_cli import Tokenizer
from movq_cli.app import app
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import code_statistics, extractors
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.run_history import RunHistory
from tests.evaluation.test_fid_evaluator import WIDTH, Projection

pytestmark = pytest.mark.usefixtures("offline")


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[dict, str]:
    """The result of the command and its lines on stderr."""
    capsys.readouterr()
    app(["evaluate", "--json", *map(str, arguments)], standalone_mode=False)
    out, said = capsys.readouterr()
    return json.loads(out), said


def central_square(image: np.ndarray) -> np.ndarray:
    """The central square of 16 pixels of an image whose short side, the height, has 16 pixels."""
    left = (image.shape[1] - 16) // 2
    return image[:, left : left + 16]


def test_the_codes_of_a_set_are_measured_and_earlier_priors_are_named(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    result, said = evaluate(capsys, "--codes", "data", "--run", "runs/tiny-vq", "--out", "codes.json")
    model = Tokenizer.load("runs/tiny-vq")
    split = PreparedSet.open(Path("data")).split("val")
    # By default the central squares of the tokenizer's size are encoded, as for the training of a prior.
    crops = np.stack([central_square(split.pixels(index)) for index in range(12)])
    with torch.inference_mode():
        codes = model.encode(torch.from_numpy(crops.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)).numpy()
    chunks = [code_statistics.entropy(codes[..., chunk]) for chunk in range(4)]
    described = result["protocol"]["codes"]
    assert described["grid"] == [8, 8, 4]
    assert described["entropy_of_chunks"] == pytest.approx(chunks)
    assert result["code_entropy"] == pytest.approx(np.mean(chunks))
    across = code_statistics.mutual_information(codes[:, :, :-1, 1].ravel(), codes[:, :, 1:, 1].ravel())
    assert described["information"]["horizontal"]["1"]["adjusted"] == pytest.approx(across.adjusted)
    assert set(described["information"]["chunks"]) == {"0-1", "0-2", "0-3", "1-2", "1-3", "2-3"}

    (prior,) = described["priors"]
    history = RunHistory.read(Path("runs/tiny-prior"))
    losses, entropies = (history.series(name, "validation").values for name in ("loss", "unigram_entropy"))
    assert (prior["run"], prior["same_tokenizer"]) == ("runs/tiny-prior", True)
    assert result["prior_gain"] == prior["gain"] == entropies[int(np.argmin(losses))] - min(losses)

    # The run may also be the first argument.
    assert evaluate(capsys, "--codes", "runs/tiny-vq", "data")[0]["code_entropy"] == result["code_entropy"]

    assert "perturbed_fid" not in result
    assert said.count("no perturbed FID: the weights weights-inception") == 1
    assert {key: json.loads(Path("codes.json").read_text())[key] for key in result} == result


def test_the_fid_of_perturbed_codes_is_measured_with_the_weights(
    trained_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights" / WEIGHTS["inception"].file
    path.parent.mkdir()
    path.write_bytes(b"stub")
    found = extractors.Inception(Projection(), "projection", WIDTH, path)
    monkeypatch.setattr(extractors, "load_inception", lambda *_: found)
    monkeypatch.chdir(trained_once)
    options = ("--weights", path.parent, "--cache", tmp_path / "cache", "--run", "runs/tiny-vq")
    result, _ = evaluate(capsys, "--codes", "data", *options)
    fids = result["protocol"]["codes"]["perturbed_fids"]
    assert list(fids) == ["0.0", "0.1", "0.3", "0.5"]
    assert result["code_rfid"] == fids["0.0"]
    assert result["perturbed_fid"] == pytest.approx((fids["0.1"] + fids["0.3"] + fids["0.5"]) / 3)
    assert result["protocol"]["weights"]["inception"]["file"] == path.name


def test_options_without_effect_and_a_second_set_are_refused(
    trained_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained_once)
    for option in ("--codebook", "--psnr", "--gpus=1", "--copies=x.png", "--stats=x"):
        with pytest.raises(BadRequestError, match="has no effect"):
            app(["evaluate", "data", "--codes", option], standalone_mode=False)
    with pytest.raises(BadRequestError, match="--codes takes one set, not 2"):
        app(["evaluate", "data", "data", "--codes"], standalone_mode=False)
