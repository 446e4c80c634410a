"""The six commands run one after another as real processes on a tiny data set, and can be killed at any moment."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from movq_cli import checkpoints
from movq_cli.commands.code_maps import read_map
from movq_cli.errors import BadRequestError
from tests.forked_movq import ForkedMovq

if TYPE_CHECKING:
    from movq_cli.data.shards import PreparedSet
    from tests.conftest import Movq


def test_six_commands_work_one_into_the_next(movq: Movq, shapes: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    done = movq("prepare", shapes, "data", "--size", "16", "--val", "12", "--json")
    assert json.loads(done.stdout) == {"path": "data", "train": 48, "val": 12, "rejected": 0, "classes": 3}

    done = movq("train-vq", "--preset", tiny_yaml)
    assert done.stdout == "runs/tiny-vq\n"
    run = tmp_path / "runs" / "tiny-vq"
    assert {path.name for path in run.iterdir()} >= {"run.json", "settings.yaml", "log.jsonl", "tokenizer.safetensors"}
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "training" in record] == list(range(1, 11))
    health = {"usage", "usage_of_chunks", "perplexity", "perplexity_of_chunks"}
    assert {"psnr", "ssim", "color_error", "saturation", *health} == records[-1]["validation"].keys()
    assert Image.open(run / "pictures" / "00000010.png").size[0] > 100

    done = movq("train-prior", "--preset", tiny_yaml, "--json")
    result = json.loads(done.stdout)
    assert result["run"] == "runs/tiny-prior"
    assert result["unigram_entropy"] > 0
    assert "tokenizer: runs/tiny-vq" in done.stderr

    done = movq("reconstruct", "data", "back", "--split", "val", "--grid", "back.png", "--metrics", "--json")
    result = json.loads(done.stdout)
    assert (result["images"], result["skipped"]) == (12, 0)
    assert "tokenizer: runs/tiny-vq/tokenizer.safetensors" in done.stderr
    assert (tmp_path / "back.png").is_file()

    done = movq("evaluate", "--psnr", "--ssim", "data", "back", "--json")
    metrics = json.loads(done.stdout)
    assert metrics["psnr"] == pytest.approx(result["psnr"])
    assert metrics["ssim"] == pytest.approx(result["ssim"])

    done = movq("sample", "--steps", "8", "--n", "5", "out/", "--grid", "out.png")
    assert done.stdout == "out\n"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [image["file"] for image in manifest["images"]] == [f"{i:06d}.png" for i in range(5)]
    assert [image["class"] for image in manifest["images"]] == ["bar", "dot", "sky", "bar", "dot"]
    assert manifest["settings"]["steps"] == 8
    assert all(Image.open(tmp_path / "out" / image["file"]).size == (16, 16) for image in manifest["images"])


def test_a_discriminator_that_starts_after_the_end_of_the_run_causes_a_warning(
    movq: Movq, trained: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    late = ["train-vq", "--preset", tiny_yaml, "--run", "late", "-o", "train_vq.discriminator_start=2 epochs"]
    for command in ([*late, "--dry-run"], late):
        warned = movq(*command).stderr
        assert "warning: the adversarial loss begins at step 12, but the run ends at 10" in warned
    half = movq("train-vq", "--preset", tiny_yaml, "--run", "half", "-o", "train_vq.discriminator_start=50%").stderr
    assert "the run ends" not in half
    assert '"discriminator"' in (tmp_path / "half" / "log.jsonl").read_text()


def test_a_finished_run_is_not_repeated_and_a_longer_one_is_resumed(movq: Movq, trained: Path, tiny_yaml: Path) -> None:
    weights = trained / "runs" / "tiny-vq" / "tokenizer.safetensors"
    before = weights.read_bytes()
    done = movq("train-vq", "--preset", tiny_yaml)
    assert "finished already" in done.stderr
    assert weights.read_bytes() == before
    done = movq("train-vq", "--preset", tiny_yaml, "-o", "train_vq.steps=12")
    assert "resuming from step 10" in done.stderr
    assert weights.read_bytes() != before


def test_an_epoch_is_counted_in_image_views(movq: Movq, trained: Path, tiny_yaml: Path) -> None:
    settings = ["-o", "views.mirror=true", "-o", "train_prior.steps=null", "-o", "train_prior.epochs=0.25"]
    plan = json.loads(movq("train-prior", "--preset", tiny_yaml, *settings, "--dry-run", "--json").stdout)
    assert {name: plan[name] for name in ("images", "views", "steps_per_epoch", "steps")} == {
        "images": 48, "views": 96, "steps_per_epoch": 12, "steps": 3
    }  # fmt: skip
    done = movq("train-prior", "--preset", tiny_yaml, *settings, "--run", "runs/mirrored")
    assert "encoding train: 96/96 image views" in done.stderr
    assert "encoding val" not in done.stderr  # the codes of its centre crops are cached
    assert "an epoch is 96 image views" in done.stderr
    assert json.loads((trained / "runs" / "mirrored" / "run.json").read_text())["step"] == 3
    done = movq("train-prior", "--preset", tiny_yaml, "-o", "views.mirror=true", code=2)
    assert "views.mirror: False before, True now" in done.stderr


def test_a_prior_refuses_a_tokenizer_that_did_not_make_its_codes(movq: Movq, trained: Path, tiny_yaml: Path) -> None:
    movq("train-vq", "--preset", tiny_yaml, "--run", "runs/other", "-o", "train_vq.seed=1")
    done = movq("sample", "--n", "1", "out", "--tokenizer", "runs/other", code=2)
    assert "another tokenizer" in done.stderr
    assert not (trained / "out").exists()
    done = movq("train-prior", "--preset", tiny_yaml, "--tokenizer", "runs/other", code=2)
    assert "another tokenizer" in done.stderr
    # The newest finished run is the other one now, and the prior beside it still samples.
    movq("sample", "--n", "1", "out")


def test_the_prior_run_samples_on_its_own_wherever_it_is_moved(movq: Movq, trained: Path) -> None:
    movq("sample", "--n", "2", "before")
    (trained / "runs" / "tiny-prior").rename(trained / "elsewhere")
    (trained / "runs" / "tiny-vq").rename(trained / "gone")
    movq("sample", "--n", "2", "after", "--run", "elsewhere")
    for name in ("000000.png", "000001.png"):
        assert (trained / "before" / name).read_bytes() == (trained / "after" / name).read_bytes()


def test_images_of_any_size_and_shape_are_reconstructed_at_their_own(movq: Movq, trained: Path) -> None:
    folder = trained / "odd"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, size in enumerate([(5, 3), (7, 3), (16, 16), (33, 18), (16, 16)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "same.jpg").write_bytes((folder / "2.png").read_bytes())
    (folder / "same.png").write_bytes((folder / "2.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no image at all")
    done = movq("reconstruct", "odd", "back", "--metrics")
    assert "broken.png" in done.stderr
    assert {path.name for path in (trained / "back").iterdir()} == {
        "0.png", "1.png", "2.png", "3.png", "4.png", "same.jpg.png", "same.png.png"
    }  # fmt: skip
    for number in range(5):
        assert Image.open(trained / "back" / f"{number}.png").size == Image.open(folder / f"{number}.png").size
    # The other images of a batch do not change an image, except for the order of some sums.
    alone, beside = (np.asarray(Image.open(trained / "back" / name)).astype(int) for name in ("2.png", "same.jpg.png"))
    assert np.abs(alone - beside).max() <= 1


def test_code_maps_are_written_and_decoded_back_to_the_same_images(movq: Movq, trained: Path) -> None:
    movq("reconstruct", "data", "back", "--split", "val", "--codes", "codes")
    maps = sorted((trained / "codes").rglob("*.npy"))
    assert len(maps) == 12
    codes = np.load(maps[0], allow_pickle=False)
    assert (codes.dtype, codes.shape) == (np.uint16, (8, 10, 4))  # 20 x 16 pixels, factor 2
    assert movq("reconstruct", "codes", "again").stdout == "again\n"
    for path in (trained / "back").rglob("*.png"):
        again = trained / "again" / path.relative_to(trained / "back")
        assert np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(Image.open(again))).max() <= 1


def test_a_file_that_is_no_code_map_is_named(trained: Path) -> None:
    settings = checkpoints.load_tokenizer(trained / "runs" / "tiny-vq" / "tokenizer.safetensors").settings
    good = np.zeros((4, 5, 4), dtype=np.int32)
    np.save(trained / "codes.npy", good)
    assert np.array_equal(read_map(trained / "codes.npy", settings), good)
    for wrong in (good[0], good[..., :3], good.astype(float), good + 16, good - 1, good[:0], np.array(["a"])):
        np.save(trained / "codes.npy", wrong)
        with pytest.raises(BadRequestError, match=r"codes\.npy"):
            read_map(trained / "codes.npy", settings)
    (trained / "codes.npy").write_bytes(b"none")
    with pytest.raises(BadRequestError, match=r"codes\.npy"):
        read_map(trained / "codes.npy", settings)


def wait_for(path: Path, process: ForkedMovq) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_that_is_stopped_by_any_signal_ends_with_the_same_weights(
    movq: Movq, prepared: PreparedSet, tiny_yaml: Path, tmp_path: Path
) -> None:
    length = ["-o", "train_vq.steps=20", "-o", "train_vq.checkpoint_every=3", "-o", "train_vq.validate_every=20"]
    movq("train-vq", "--preset", tiny_yaml, "--run", "uninterrupted", *length)
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGUSR1, 130)):
        run = tmp_path / f"stopped-by-{number}"
        arguments = ["train-vq", "--preset", str(tiny_yaml), "--run", str(run), *length]
        process = ForkedMovq(arguments, tmp_path, os.environ)
        wait_for(run / "checkpoint.pt", process)
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == code, errors
        if code == 130:
            assert "Run the same command again to resume" in errors
        done = movq("train-vq", "--preset", tiny_yaml, "--run", run, *length)
        assert "resuming from step" in done.stderr
        expected, resumed = (folder / "tokenizer.safetensors" for folder in (tmp_path / "uninterrupted", run))
        assert expected.read_bytes() == resumed.read_bytes()


def test_the_python_classes_give_the_same_images_as_the_commands(
    movq: Movq, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from movq_cli import Prior, Tokenizer
    from movq_cli.data import pixels

    monkeypatch.chdir(trained)
    movq("sample", "--n", "4", "out", "--seed", "3")
    prior = Prior.load("runs/tiny-prior")
    samples = prior.sample(n=4, seed=3, classes=None)
    assert samples.shape == (4, 3, 16, 16)
    for index in range(4):
        written = np.asarray(Image.open(f"out/{index:06d}.png"))
        assert np.abs(pixels.to_bytes(samples[index]).permute(1, 2, 0).numpy().astype(int) - written).max() <= 1
    tokenizer = Tokenizer.load("runs/tiny-vq")
    codes = tokenizer.encode(samples)
    assert (codes.shape, codes.dtype) == ((4, 8, 8, 4), torch.int64)
    images = tokenizer.decode(codes)
    assert images.shape == samples.shape
    assert images.abs().max() <= 1
    untrained = Tokenizer.from_preset("digits", "vq.codebook_size=32")
    assert untrained.settings.codebook_size == 32
    assert isinstance(untrained, torch.nn.Module)
