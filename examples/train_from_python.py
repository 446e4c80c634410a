"""Train a tokenizer from Python, with settings from a preset.

    movq prepare digits data/digits
    python examples/train_from_python.py data/digits runs/my-vq train_vq.steps=200

This is what `movq train-vq` does, without its command line: use it to train with settings that a program computes, or
as the start of a training of your own. The run folder is the same, so every other command can use it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from movq_cli import Tokenizer, devices, presets, runs
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.training import loop
from movq_cli.training.vq import TokenizerTraining


def main(data: str, folder: str, *overrides: str) -> None:
    """Train on the prepared set `data`, and write the run to `folder`.

    Args:
        data: Folder that `movq prepare` wrote.
        folder: Run folder. If it holds an unfinished run of the same settings, the run resumes.
        overrides: Dotted settings, for example `train_vq.steps=200`.
    """
    settings = presets.load("digits", [f"data.path={data}", *overrides])
    images = PreparedSet.open(Path(data))
    device = devices.select(None)  # CUDA where it is available, otherwise the CPU

    # The stage holds the models and optimizers, and knows what one step does. The loop calls it: it logs, validates,
    # writes checkpoints, and resumes from them.
    stage = TokenizerTraining(settings, images, device)
    run = runs.Run(Path(folder), "vq")
    new = runs.new_manifest(
        run.kind, preset_name="digits", settings=settings, steps=stage.steps, data=images.manifest.hash
    )
    manifest = runs.start_or_resume(run, new)
    if manifest.status != "finished":
        metrics = loop.train(stage, run, manifest, Console())
        print(f"PSNR {metrics['psnr']:.2f} dB on the validation split, {metrics['usage']:.0%} of the codebook in use")

    # From here on the run is like any other.
    tokenizer = Tokenizer.load(folder)
    print(f"{sum(parameter.numel() for parameter in tokenizer.parameters()):,} parameters in {run.weights}")


if __name__ == "__main__":
    main(*sys.argv[1:])
