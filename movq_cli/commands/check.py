"""`movq check`: compare all files of a run, a prepared set, a cache or samples with their digests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from movq_cli import digested_lines, digests
from movq_cli.commands import prepared
from movq_cli.console import Console
from movq_cli.data import code_cache, sample_files, shards, tuned_settings
from movq_cli.data.shards import DatasetManifest
from movq_cli.data.tuned_settings import TunedSettings
from movq_cli.errors import BadRequestError, FailureError, MovqError
from movq_cli.evaluation import feature_cache
from movq_cli.run_manifest import COMMAND, RunManifest
from movq_cli.runs import Run

Check = tuple[int, Callable[[], list[str]]]
"""A number of files, and the function that checks them; it returns or raises their errors."""

_SUFFIXES = {".safetensors", ".pt", ".zip", ".npz"}
"""Suffixes of single files that carry a digest."""


def check(path: Path, *, workers: int, console: Console) -> None:
    """Check a file or a folder, and report every damaged file with what makes it again.

    Args:
        path: Run folder, prepared set, code cache, feature cache, samples, a single file of these, or a folder that
            contains such folders.
        workers: Number of threads.
        console: Console for progress and the result; each error is a warning.

    Raises:
        BadRequestError: There is nothing that carries a digest.
        FailureError: A file is damaged.
    """
    if not path.exists():
        raise BadRequestError(f"there is no file or folder {path}")
    errors: list[str] = []
    files = 0
    for count, find_errors in _checks_of_folder(path, workers, console) if path.is_dir() else [_check_of_file(path)]:
        files += count
        try:
            errors += find_errors()
        except MovqError as error:
            errors.append(str(error))
    if not files:
        remedy = "Name the folder of one, or one of its files."
        raise BadRequestError(f"{path} holds no run, prepared set, cache or samples", remedy)
    for text in errors:
        console.warn(text)
    state = f"{len(errors)} errors" if errors else "no errors"
    console.result({"path": str(path), "files": files, "errors": errors}, f"{path}\t{files} files: {state}")
    if errors:
        raise FailureError(f"{path} is damaged: {state}", "The warnings above say what makes each file again.")


def _checks_of_folder(folder: Path, workers: int, console: Console) -> Iterator[Check]:
    """Yield the checks of a folder, by the file that marks its kind, and of all folders in it."""
    manifest = folder / sample_files.MANIFEST
    if (folder / code_cache.HEADER).is_file():
        yield 3, partial(_check_code_cache, folder)
    elif (folder / feature_cache.HEADER).is_file():
        yield 3, partial(_check_feature_cache, folder)
    elif (folder / shards.PLAN).is_file() or (manifest.is_file() and _is_prepared_set(manifest)):
        count = 1 + sum(1 for _ in folder.glob("*/*.zip"))
        yield count, partial(_check_prepared_set, folder, workers, console)
    elif manifest.is_file():
        count = 1 + sum(1 for _ in folder.glob("*.png"))
        yield count, partial(_check_samples, folder, console)
    else:
        if (folder / "run.json").is_file():
            yield from _checks_of_run(folder)
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                yield from _checks_of_folder(entry, workers, console)
            elif sample_files.manifest_of_file(entry).is_file():
                yield _check_of_file(entry)


def _checks_of_run(folder: Path) -> Iterator[Check]:
    """Yield the checks of a run's manifest, checkpoint and weights."""
    run = Run(folder, "vq")
    yield 1, partial(_check_run_manifest, run)
    kept = (run.kept_checkpoint(step) for step in run.kept_steps())
    for path in sorted([*(path for path in folder.iterdir() if path.suffix in {".pt", ".safetensors"}), *kept]):
        yield 1, partial(_check_digest, path, f"Remove it, and run the command that trained {folder} again.")
    for path in sorted(folder.glob("*-tuned.json")):
        yield 1, partial(_check_tuned_settings, path)
    for path in (folder / tuned_settings.SEARCH / tuned_settings.JOURNAL, run.log):
        if path.is_file():
            yield 1, partial(_check_lines, path)
    if not any(path.suffix == ".safetensors" for path in folder.iterdir()):
        yield 0, lambda: [f"{folder} has no weights. Run the command that trained it again."]


def _check_of_file(path: Path) -> Check:
    """Return the check of a single file.

    Raises:
        BadRequestError: Files of this format carry no digest.
    """
    if path.suffix not in _SUFFIXES:
        known = ", ".join(sorted(_SUFFIXES))
        raise BadRequestError(f"{path} is no file with a digest", f"Name a folder, or a file with one of {known}.")
    manifest = sample_files.manifest_of_file(path)
    if manifest.is_file():
        return 2, partial(_check_sample_file, path, manifest)
    return 1, partial(_check_digest, path, "Make it again with the command that wrote it.")


def _check_digest(path: Path, remedy: str) -> list[str]:
    digests.check(path, remedy)
    return []


def _check_tuned_settings(path: Path) -> list[str]:
    digests.read_header(path, TunedSettings, tuned_settings.REMEDY)
    return []


def _check_lines(path: Path) -> list[str]:
    numbers = digested_lines.damaged(path.read_bytes())
    if not numbers:
        return []
    remedy = tuned_settings.JOURNAL_REMEDY
    if path.name != tuned_settings.JOURNAL:
        remedy = "No command can make it again. Remove these lines: reports leave them out."
    return [f"{path} is damaged in line {', '.join(map(str, numbers))}. {remedy}"]


def _check_sample_file(path: Path, manifest: Path) -> list[str]:
    remedy = sample_files.file_remedy(path)
    digests.read_header(manifest, sample_files.SampleManifest, remedy)
    return _check_digest(path, remedy)


def _check_run_manifest(run: Run) -> list[str]:
    manifest: RunManifest = run.read()
    run = Run(run.folder, manifest.kind)
    if manifest.step and not run.checkpoint.is_file():
        command = f"movq {COMMAND[run.kind]}"
        return [f"{run.checkpoint} is missing. Remove {run.folder}, and train again with `{command}`."]
    return []


def _check_code_cache(folder: Path) -> list[str]:
    code_cache.check_files(folder, code_cache.read_cache_header(folder))
    return []


def _check_feature_cache(folder: Path) -> list[str]:
    feature_cache.check_features(folder)
    return []


def _check_samples(folder: Path, console: Console) -> list[str]:
    names = sample_files.damaged_samples(folder, console)
    return [f"{folder / name} is missing or damaged. {sample_files.FOLDER_REMEDY}" for name in names]


def _is_prepared_set(manifest: Path) -> bool:
    """Return whether a manifest that may be damaged is that of a prepared set and not one of samples."""
    if any((manifest.parent / split).is_dir() for split in shards.SPLITS):
        return True
    try:
        return "shards" in json.loads(digests.read_json(manifest, "", sample_files.SampleManifest.max_bytes)[0])
    except (OSError, ValueError, TypeError, RecursionError, BadRequestError):
        return False


def _check_prepared_set(folder: Path, workers: int, console: Console) -> list[str]:
    manifest = DatasetManifest.read(folder)
    errors = prepared.find_errors(folder, manifest, workers=workers, console=console)
    return [f"{error}. {prepared.remedy(folder)}" for error in errors]
