"""An option that would have no effect is refused before any work, in one line that names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from movq_cli import checkpoints, launcher
from movq_cli.app import app
from movq_cli.errors import BadRequestError
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset

FILL = ["reconstruct", "imgs", "out", "--mask-ratio", "0.5"]


def refusal(*arguments: str | Path) -> str:
    """Return the message with which a command refuses its arguments."""
    with pytest.raises(BadRequestError) as caught:
        app([str(argument) for argument in arguments], standalone_mode=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["evaluate", "--table", "a.json", "--psnr"], "--psnr"),
        (["evaluate", "--table", "a.json", "--split", "val"], "--split"),
        (["evaluate", "--table", "a.json", "--batch-size", "32"], "--batch-size"),
        (["evaluate", "--table", "a.json", "--stats", "name"], "--stats"),
        (["evaluate", "--table", "a.json", "--copies", "c.png"], "--copies"),
        (["evaluate", "--table", "a.json", "--codes"], "--codes"),
        (["evaluate", "real", "--stats", "name", "--fid"], "--fid"),
        (["evaluate", "real", "--stats", "name", "--codebook"], "--codebook"),
        (["evaluate", "real", "--stats", "name", "--preset", "ffhq"], "--preset"),
        (["evaluate", "real", "--stats", "name", "--out", "b.json"], "--out"),
        (["evaluate", "real", "fake", "--run", "runs/vq"], "--run"),
        (["evaluate", "real", "fake", "--weights-of", "last"], "--weights-of"),
        (["evaluate", "real", "fake", "--all", "--psnr"], "--all"),
        (["evaluate", "real", "--codebook", "--gpus", "2"], "--gpus"),
        (["evaluate", "real", "fake", "--psnr", "--lpips", "--cache", "c"], "--cache"),
        (["evaluate", "real", "fake", "--psnr", "--weights", "w"], "--weights"),
        (["evaluate", "real", "--codebook", "--preset", "ffhq"], "--preset"),
        (["evaluate", "--table", "a.json", "--background", "0,0,0"], "--background"),
        (["prepare", "imgs", "--check", "--size", "16"], "--size"),
        (["prepare", "imgs", "--show", "--workers", "2"], "--workers"),
        (["prepare", "imgs", "--show", "--val-list", "l.txt"], "--val-list"),
        (["prepare", "imgs", "out", "--upscale"], "--upscale"),
        (["prepare", "imgs", "out", "--val", "5", "--val-list", "l.txt"], "--val"),
        (["prepare", "imgs", "out", "--no-labels", "--val-labels", "l.txt"], "--val-labels"),
        (["reconstruct", "imgs", "out", "--seed", "0"], "--seed"),
        (["reconstruct", "imgs", "out", "--weights", "w"], "--weights"),
        ([*FILL, "--batch-size", "16"], "--batch-size"),
        ([*FILL, "--weights", "w"], "--weights"),
        ([*FILL, "--top1", "--steps", "3"], "--steps"),
        ([*FILL, "--top1", "--samples", "2"], "--samples"),
        (["reconstruct", "imgs", "out", "--mask", "m.png", "--top1", "--seed", "1"], "--seed"),
        (["presets", "--json", "show", "digits"], "--json"),
    ],
)
def test_an_option_without_effect_is_refused_and_named(arguments: list[str], option: str) -> None:
    message = refusal(*arguments)
    assert message.startswith(f"{option} has no effect ")
    assert message.endswith(f"Leave {option} out.")


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["train-vq", "--preset", "digits", "-o", "train_prior.steps=6"], "train_prior.steps"),
        (["train-vq", "--preset", "digits", "-o", "sample.steps=6"], "sample.steps"),
        (["train-vq", "--preset", "digits", "-o", "prior={}"], "prior"),
        (["train-prior", "--preset", "digits", "-o", "train_vq.steps=6"], "train_vq.steps"),
        (["train-prior", "--preset", "digits", "-o", "target.fid=6"], "target.fid"),
    ],
)
def test_a_setting_of_another_command_is_refused(arguments: list[str], setting: str) -> None:
    assert refusal(*arguments, "--dry-run").startswith(f"-o {setting} has no effect on `movq {arguments[0]}`")


@pytest.mark.parametrize(
    ("command", "option", "setting"),
    [
        ("train-vq", ["--data", "a"], "data.path=b"),
        ("train-vq", ["--freeze", "encoder"], "train_vq.freeze=[decoder]"),
        ("train-prior", ["--data", "a"], "data.path=b"),
        ("train-prior", ["--mode", "auto"], "prior.mode=depth"),
    ],
)
def test_an_option_and_an_override_of_one_setting_are_refused(command: str, option: list[str], setting: str) -> None:
    message = refusal(command, "--preset", "digits", *option, "-o", setting, "--dry-run")
    assert message.startswith(f"{option[0]} and -o {setting.partition('=')[0]} both give this setting")


@pytest.mark.parametrize(("local", "world", "is_refused"), [("2", "4", False), ("4", "8", True), (None, "2", False)])
def test_gpus_beside_another_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, local: str | None, world: str, is_refused: bool
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert launcher.starts_processes(2)
    assert not launcher.starts_processes(None)
    monkeypatch.setenv("WORLD_SIZE", world)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert not launcher.starts_processes(None)
    if is_refused:
        with pytest.raises(BadRequestError, match="has started 4 processes"):
            launcher.starts_processes(2)
    else:
        assert not launcher.starts_processes(2)


@pytest.mark.parametrize(
    "option", [["--split", "val"], ["--grid", "g.png"], ["--metrics"], ["--codes", "c"], ["--source-names"]]
)
def test_options_of_images_are_refused_for_code_maps(tmp_path: Path, option: list[str]) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 2, 4), np.uint16))
    message = refusal("reconstruct", tmp_path, tmp_path / "out", *option)
    assert message.startswith(f"{option[0]} has no effect: {tmp_path} is a folder of code maps")


def test_a_split_of_sets_without_splits_is_refused(shapes: Path, tiny: Preset, tmp_path: Path) -> None:
    weights = tmp_path / "tokenizer.safetensors"
    checkpoints.save_weights(weights, Tokenizer(tiny.vq), checkpoints.TokenizerHeader(vq=tiny.vq))
    message = refusal("evaluate", shapes, "--codebook", "--run", weights, "--split", "train", "--device", "cpu")
    assert message == f"--split has no effect: {shapes} does not have splits. Leave --split out."
    message = refusal("evaluate", shapes, shapes / "sky", "--psnr", "--split", "train", "--device", "cpu")
    assert message.startswith(f"--split has no effect: neither {shapes} nor {shapes / 'sky'} has splits")
