"""The commands of the campaign, in their order, and the comparison of what they leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from movq_cli import checkpoints
from movq_cli.checkpoints import TokenizerHeader
from tests.campaign.forked import run
from tests.conftest import TINY, draw_shapes
from tests.interop import peers


@dataclass(frozen=True)
class Command:
    """A command of the pipeline."""

    name: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    """Files and folders that it makes."""


COMMANDS = (
    Command("prepare", ("prepare", "pictures", "data", "--size", "16", "--val", "12", "--workers", "0"), ("data",)),
    Command("train-vq", ("train-vq", "--preset", "tiny.yaml", "--run", "vq"), ("vq",)),
    Command(
        "train-prior",
        ("train-prior", "--preset", "tiny.yaml", "--tokenizer", "vq", "--run", "prior"),
        ("vq/tokens", "prior"),
    ),
    Command("sample", ("sample", "samples", "--n", "3", "--run", "prior", "--batch-size", "2"), ("samples",)),
    Command("sample to a zip", ("sample", "samples.zip", "--n", "3", "--run", "prior"), ("samples.zip",)),
    Command("sample to an npz", ("sample", "samples.npz", "--n", "3", "--run", "prior"), ("samples.npz",)),
    Command(
        "reconstruct",
        ("reconstruct", "data", "back", "--split", "val", "--run", "vq", "--codes", "codes"),
        ("back", "codes"),
    ),
    Command(
        "evaluate",
        ("evaluate", "data", "back", "--psnr", "--ssim", "--codebook", "--run", "vq", "--out", "result.json"),
        ("result.json",),
    ),
    Command("export", ("export", "public.safetensors", "exported", "--to", "compvis"), ("exported",)),
    Command("import", ("import", "exported", "imported"), ("imported",)),
    Command(
        "train-vq --from",
        ("train-vq", "--preset", "tiny.yaml", "--from", "vq", "--run", "branch", "-o", "train_vq.steps=12"),
        ("branch",),
    ),
    Command("report", ("report", "vq", "page.html"), ("page.html",)),
)

VARYING = {"run.json", "log.jsonl", "result.json", "settings.yaml", "page.html", "new.html"}
"""Files that contain times and speeds, which differ from run to run."""


def make_pipeline(folder: Path) -> None:
    """Run all commands in a new folder.

    A prepared set names its source by an absolute path, so all copies must be used at this path.
    """
    folder.mkdir(parents=True)
    draw_shapes(folder / "pictures")
    settings = {**TINY, "data": {"path": "data"}}
    (folder / "tiny.yaml").write_text(json.dumps(settings))
    # The tokenizer of the tiny preset has four chunks, for which other projects have no format.
    model = peers.tokenizer(peers.VQGAN)
    checkpoints.save_weights(folder / "public.safetensors", model, TokenizerHeader(vq=peers.VQGAN))
    for command in COMMANDS:
        outcome = run(folder, *command.arguments)
        assert outcome.code == 0, outcome.stderr


def copy_before(reference: Path, command: Command, folder: Path) -> Path:
    """Copy a complete pipeline without the outputs of a command and of those after it."""
    index = COMMANDS.index(command)
    later = {output for made in COMMANDS[index:] for output in made.outputs}
    earlier = {output for made in COMMANDS[:index] for output in made.outputs}
    shutil.copytree(reference, folder)
    for output in later - earlier:
        for path in folder.glob(f"{output}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def differences(reference: Path, folder: Path, outputs: tuple[str, ...]) -> Iterator[str]:
    """Yield each file of some outputs that is missing, unequal, or left over."""
    expected, found = ({path.relative_to(root) for path in _files(root, outputs)} for root in (reference, folder))
    for path in sorted(expected - found):
        yield f"lost: {path}"
    for path in sorted(found - expected):
        yield f"left over: {path}"
    for path in sorted(expected & found):
        if path.name not in VARYING and not _is_equal(reference, folder, path):
            yield f"unequal: {path}"


def _files(root: Path, outputs: tuple[str, ...]) -> Iterator[Path]:
    for output in outputs:
        for start in sorted(root.glob(f"{output}*")):  # What a killed command leaves lies beside its output.
            if output == "samples" and start.suffix:
                continue  # It belongs to the set that is a file.
            paths = start.rglob("*") if start.is_dir() else [start]
            # The code caches are made later, in the folder of the tokenizer.
            skipped = {"tensorboard", *({"tokens"} if output == "vq" else ())}
            yield from (path for path in paths if path.is_file() and not skipped & set(path.parts))


def _is_equal(one: Path, other: Path, path: Path) -> bool:
    """Return whether a file is equal in two folders."""
    if path.suffix != ".pt":
        return (one / path).read_bytes() == (other / path).read_bytes()
    try:
        states = [torch.load(root / path, weights_only=True) for root in (one, other)]
    except Exception:
        return False
    return states[0]["step"] == states[1]["step"] and _are_equal(states[0]["stage"], states[1]["stage"])


def _are_equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    return one == other
