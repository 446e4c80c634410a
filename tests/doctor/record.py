"""Records the logs in tests/doctor/runs: real trainings of a tiny model, healthy ones and ones made ill on purpose.

    python -m tests.doctor.record FOLDER [NAME...]

FOLDER receives the data and the complete runs; what the tests need is copied to tests/doctor/runs. All of it takes some
15 minutes on one core. The run `samples-do-not-improve` needs Inception's weights (`movq weights --fetch`).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from movq_cli import digests
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.commands.train_prior import train_prior
from movq_cli.commands.train_vq import train_vq
from movq_cli.commands.training import TrainRequest
from movq_cli.console import Console
from movq_cli.errors import MovqError
from movq_cli.run_history import RunHistory

RUNS = Path(__file__).parent / "runs"

_SHARED = {
    "batch_size": 8,
    "epochs": None,
    "steps": 240,
    "base_learning_rate": 1.25e-4,
    "decay": "cosine",
    "ema_decay": 0.95,
    "precision": "float32",
    "log_every": 6,
    "validate_every": 40,
    "checkpoint_every": 240,
    "tensorboard": False,
    "report": False,
}

PRESET = {
    "description": "a tiny model",
    "vq": {
        "resolution": 16,
        "channels": 32,
        "multipliers": [1, 1],
        "blocks": 1,
        "attention_resolutions": [],
        "z_channels": 16,
        "embed_dim": 16,
        "codebook_size": 32,
        "norm_groups": 8,
        "modulation": {"levels": 1},
    },
    "train_vq": {
        **_SHARED,
        "l2_weight": 1.0,
        "perceptual_weight": 0.0,
        "adversarial_weight": 0.1,
        "adaptive_weight_limit": 1.0,
        "discriminator_start": 120,
        "discriminator_warmup": 20,
        "discriminator_ramp": 20,
        "discriminator_channels": 8,
        "discriminator_layers": 1,
        "revive_every": 10,
    },
    "prior": {"layers": 2, "heads": 2, "width": 64, "hidden": 128, "classes": 0},
    "train_prior": {**_SHARED, "steps": 480, "validate_every": 80, "base_learning_rate": 2.5e-4, "log_every": 12},
    "sample": {"steps": 4},
}

TOKENIZERS: dict[str, list[str]] = {
    "healthy-tokenizer": [],
    "healthy-without-discriminator": ["train_vq.adversarial_weight=0"],
    "codebook-collapse": ["vq.codebook_size=512", "train_vq.revive_every=0"],
    "discriminator-never-starts": ["train_vq.discriminator_start=400"],
    "discriminator-too-early": ["train_vq.discriminator_start=45", "train_vq.discriminator_warmup=0",
                                "train_vq.adversarial_weight=20", "train_vq.adaptive_weight_limit=1e4",
                                "train_vq.discriminator_learning_rate=0.02"],
    "discriminator-too-strong": ["train_vq.freeze=[decoder]", "train_vq.discriminator_start=20",
                                 "train_vq.discriminator_learning_rate=0.01"],
    "discriminator-learns-nothing": ["train_vq.discriminator_learning_rate=1e-9"],
    "adaptive-weight-at-limit": ["train_vq.adaptive_weight_limit=0.01"],
    "colors-lost": ["vq.norm_groups=32", "train_vq.adversarial_weight=0"],
    "learning-rate-too-high": ["train_vq.base_learning_rate=0.05"],
    "learning-rate-too-low": ["train_vq.base_learning_rate=1e-9"],
    "few-validation-images": ["train_vq.validate_images=8"],
    "bound-by-data": ["data.path=large", "data.workers=0", "train_vq.steps=60", "train_vq.validate_every=60",
                      "train_vq.discriminator_start=10", "train_vq.adversarial_weight=0"],
}  # fmt: skip
"""Settings of each run of `movq train-vq` beside those of the preset."""

PRIORS: dict[str, list[str]] = {
    "healthy-prior": [],
    "not-below-unigram": ["train_prior.base_learning_rate=1e-7"],
    "overfitting": ["data.path=small", "train_prior.base_learning_rate=2e-4", "train_prior.steps=1200",
                    "train_prior.validate_every=150", "train_prior.log_every=30", "train_prior.decay=none",
                    "prior.width=128", "prior.hidden=512", "prior.layers=3", "train_prior.label_smoothing=0"],
    "average-not-warm": ["train_prior.ema_decay=0.9999", "train_prior.steps=45", "train_prior.validate_every=15",
                         "train_prior.log_every=3", "train_prior.decay=none", "train_prior.base_learning_rate=6e-5"],
    "wrong-views": ["data.path=unlike", "train_prior.steps=240", "train_prior.validate_every=60"],
    "samples-do-not-improve": ["sample.temperature=50", "train_prior.evaluate_every=80",
                               "train_prior.evaluate_images=64"],
}  # fmt: skip
"""Settings of each run of `movq train-prior`, on the codes of `healthy-tokenizer`."""

QUIET = Console(quiet=True, mute=True)


def main(folder: Path, names: list[str]) -> None:
    """Train the named runs, or all, and copy what the tests need."""
    torch.set_num_threads(1)
    for name, size, count, val in (("data", 16, 600, 120), ("large", 1600, 24, 8), ("small", 16, 120, 104)):
        if not (folder / name / "manifest.json").is_file():
            draw(folder / f"{name}-pictures", size, count)
            source = str(folder / f"{name}-pictures")
            prepare(PrepareRequest(source, folder / name, Preprocessing(size=size), val=str(val)), QUIET)
    if not (folder / "unlike" / "manifest.json").is_file():
        draw(folder / "unlike-pictures" / "train", 16, 400)
        draw(folder / "unlike-pictures" / "val", 16, 100, brightest=64)
        prepare(PrepareRequest(str(folder / "unlike-pictures"), folder / "unlike", Preprocessing(size=16)), QUIET)
    preset = folder / "tiny.yaml"
    preset.write_text(json.dumps({**PRESET, "data": {"path": str(folder / "data")}}))
    tokenizer = folder / "runs" / "healthy-tokenizer"
    for name in names or [*TOKENIZERS, *PRIORS]:
        run = folder / "runs" / name
        shutil.rmtree(run, ignore_errors=True)
        overrides = [_in(folder, setting) for setting in (TOKENIZERS | PRIORS)[name]]
        try:
            if name in TOKENIZERS:
                train_vq(TrainRequest(str(preset), overrides, run=run, device_name="cpu"), QUIET)
            else:
                train_prior(
                    TrainRequest(str(preset), overrides, run=run, tokenizer=tokenizer, device_name="cpu"), QUIET
                )
        except MovqError as error:  # A rate that is too high may end in a step that is not finite.
            sys.stderr.write(f"{name}: {error}\n")
        copy(run, RUNS / name)


def copy(run: Path, to: Path) -> None:
    """Copy the manifest and the log of a run, and the last pictures of the healthy tokenizer."""
    shutil.rmtree(to, ignore_errors=True)
    history = RunHistory.read(run)
    (to / "pictures").mkdir(parents=True)  # Empty for most: Git does not store it.
    shutil.copy(run / "log.jsonl", to / "log.jsonl")
    # Paths of this machine say nothing elsewhere.
    values = json.loads((run / "run.json").read_text().replace(f"{run.parents[1]}/", ""))
    (to / "run.json").write_bytes(digests.with_digest(json.dumps({**values, "digest": digests.NO_DIGEST}).encode()))
    for step in history.pictures[-3:] if run.name == "healthy-tokenizer" else ():
        shutil.copy(history.run.picture(step), to / "pictures" / f"{step:08d}.png")


def draw(folder: Path, size: int, count: int, *, brightest: int = 256) -> None:
    """Write pictures with a sloping background of two colors, and a disc or a square of a third one.

    Args:
        folder: Folder of the pictures.
        size: Side of the pictures, pixels.
        count: Number of the pictures.
        brightest: Level below which all colors are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(size)
    y, x = np.mgrid[0:size, 0:size] / size
    for number in range(count):
        first, second, third = rng.integers(0, brightest, (3, 3)).astype(np.float64)
        angle, (cx, cy), radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.75, 2), rng.uniform(0.15, 0.35)
        share = np.clip(0.5 + np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5), 0, 1)[..., None]
        picture: Any = share * first + (1 - share) * second
        inside = (
            (x - cx) ** 2 + (y - cy) ** 2 < radius**2 if number % 2 else np.maximum(abs(x - cx), abs(y - cy)) < radius
        )
        picture[inside] = third
        Image.fromarray(picture.round().astype(np.uint8)).save(folder / f"{number:04d}.png")


def _in(folder: Path, setting: str) -> str:
    """Return a setting with the path of its data inside a folder."""
    name, _, value = setting.partition("=")
    return f"data.path={json.dumps(str(folder / value))}" if name == "data.path" else setting


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
