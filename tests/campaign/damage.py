"""Damaged files: each file of a run, a set, a cache and samples is damaged, and the commands that read it are run."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.campaign.forked import Outcome, run
from tests.campaign.pipeline import COMMANDS, differences
from tests.campaign.result import Case

FREE = {"settings.yaml", "log.jsonl", "rejects.jsonl", "README.md", "config.yaml"}
"""Files for people, of which a log's damaged lines are left out with a warning, and a config in the format of another
project, whose files have no digests."""

Damage = Callable[[bytes, random.Random], bytes | None]
"""Function that returns the damaged content of a file; None removes it."""


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Damage] = {
    "flipped bit": _flip,
    "truncated": lambda content, rng: content[: rng.randrange(len(content)) if content else 0],
    "empty": lambda _content, _rng: b"",
    "removed": lambda _content, _rng: None,
    "other content": lambda _content, rng: rng.randbytes(1000),
}

READERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "data": (
        COMMANDS[0].arguments,
        ("train-vq", "--preset", "tiny.yaml", "--run", "new"),
        ("reconstruct", "data", "new", "--run", "vq"),
    ),
    "vq": (
        ("train-vq", "--preset", "tiny.yaml", "--run", "vq", "-o", "train_vq.steps=11"),
        ("train-prior", "--preset", "tiny.yaml", "--tokenizer", "vq", "--run", "new"),
        ("reconstruct", "data", "new", "--run", "vq"),
        ("export", "vq", "new", "--to", "safetensors"),
        ("report", "vq", "new.html"),
    ),
    "prior": (
        ("train-prior", "--preset", "tiny.yaml", "--tokenizer", "vq", "--run", "prior", "-o", "train_prior.steps=11"),
        ("sample", "new", "--n", "1", "--run", "prior"),
    ),
    "samples": (COMMANDS[3].arguments,),
    "samples.zip": (COMMANDS[4].arguments,),
    "samples.npz": (COMMANDS[5].arguments,),
    "codes": (("reconstruct", "codes", "new", "--run", "vq"),),
    "exported": (("import", "exported", "new"),),
    "imported": (("reconstruct", "data", "new", "--run", "imported"),),
    "branch": (("train-vq", "--preset", "tiny.yaml", "--run", "branch", "-o", "train_vq.steps=13"),),
    "result.json": (("evaluate", "--table", "result.json"),),
}
"""For each output of the pipeline the commands that read it."""

NEW = ("new", "vq", "prior", "data", "samples", "samples.zip", "samples.npz", "branch")
"""Outputs of the readers."""


def damages(reference: Path, folder: Path, seed: int, share: float) -> Iterator[Case]:
    """Yield the result of each damage of each file.

    A reader may succeed only with the result that it has without the damage; otherwise it must name the file. The
    remedy that it names must work if it says to remove something.

    Args:
        reference: Folder of the complete pipeline.
        folder: Path at which it was made, for copies of it.
        seed: Seed of the damage.
        share: Share of the cases that is tried, in 0..1.
    """
    rng = random.Random(seed)
    undamaged: dict[tuple[str, ...], Path] = {}
    for output, readers in READERS.items():
        for path in _files(reference, output):
            for name, damage in DAMAGES.items():
                if rng.random() > share or (name, output) == ("removed", "codes"):
                    continue  # Without a file, its folder is a smaller set of code maps.
                reader = rng.choice(readers)
                if reader not in undamaged:
                    shutil.copytree(reference, folder)
                    outcome = run(folder, *reader)
                    assert outcome.code == 0, outcome.stderr
                    undamaged[reader] = folder.rename(folder.with_name(f"undamaged-{len(undamaged)}"))
                yield _case(reference, undamaged[reader], folder, path, name, damage, reader, rng)


def _files(reference: Path, output: str) -> list[Path]:
    start = reference / output
    paths = sorted(start.rglob("*")) if start.is_dir() else sorted(reference.glob(f"{output}*"))
    skipped = {"tensorboard", "pictures"}
    return [path for path in paths if path.is_file() and path.name not in FREE and not skipped & set(path.parts)]


def _case(
    reference: Path,
    undamaged: Path,
    copy: Path,
    original: Path,
    name: str,
    damage: Damage,
    reader: Sequence[str],
    rng: random.Random,
) -> Case:
    shutil.copytree(reference, copy)
    path = copy / original.relative_to(reference)
    content = damage(path.read_bytes(), rng)
    path.unlink() if content is None else path.write_bytes(content)
    outcome = run(copy, *reader)
    problems: list[str] = []
    if outcome.code == 0:
        found = differences(undamaged, copy, NEW)
        # A file that the command does not read, and that it has not made again, stays as it is.
        problems = [f"silent: {text}" for text in found if str(path.relative_to(copy)) not in text]
    elif not outcome.is_clear:
        problems = [f"unclear: {outcome.stderr.strip()[-1500:]}"]
    else:
        problems = [*_unnamed(outcome, path, copy), *_failed_remedy(outcome, undamaged, copy, reader)]
    shutil.rmtree(copy)
    return Case(f"{name}: {path.relative_to(copy)}, read by {' '.join(reader[:3])}", problems)


def _unnamed(outcome: Outcome, path: Path, copy: Path) -> Iterator[str]:
    """Yield an error if neither the damaged file nor its folder is named."""
    names = [path.name, str(path.parent.relative_to(copy))]
    if not any(name in outcome.error_lines[0] for name in names):
        yield f"unclear: {path.name} is not named: {outcome.error_lines[0]}"


def _failed_remedy(outcome: Outcome, undamaged: Path, copy: Path, reader: Sequence[str]) -> Iterator[str]:
    """Yield an error if the remedy is to remove something, and the command fails after that too."""
    line = outcome.error_lines[0]
    removed = re.search(r"Remove (?:the (?:folder|file) )?(\S+?)[,. ]", line + " ")
    if removed is None:
        return
    target = removed[1]
    if target in {"it", "this", "the"} or not (copy / target).exists():
        named = [word.strip(",.:;()") for word in line.split() if (copy / word.strip(",.:;()")).exists()]
        if not named:
            return
        target = named[0]
    victim = copy / target
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    again = run(copy, *reader)
    if again.code != 0 and "movq" not in again.error_lines[0]:
        yield f"unclear: the remedy does not work: {line} -> {again.stderr.strip()[-300:]}"
