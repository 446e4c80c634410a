"""Measure the techniques of docs/beyond.md: the same tokenizer and prior with one setting changed in each row.

    python -m benchmarks.quality cifar10.zip                           all rows, three seeds, to benchmarks/results/
    python -m benchmarks.quality photos/ --preset photos-64            the same at 64 pixels
    python -m benchmarks.quality cifar10.zip --rows default rotation --seeds 0 1 --without-prior
    python -m benchmarks.quality cifar10.zip --show                    the table of what is measured so far

All rows share images, steps, batch size, losses and, but for the few weights of some quantizers, parameters; the table
has the number of parameters. The row `default` is the preset with the straight-through gradient, the default of movq.
The other rows differ from it in the settings that `ROWS` gives. Each row has one run for each seed, and the table has
the mean over the seeds and their standard deviation.

- rFID, of all held-out images, and LPIPS, PSNR and usage of the last validation.
- perturbed rFID: the FID of reconstructions in which a share of the codes (`--shares`, the mean over them) is replaced
  by one of the nearest sixteenth of the codebook (movq_cli/evaluation/perturbed.py).
- gFID: as many samples of the preset's prior, trained on the codes of the row, as there are held-out images, without
  guidance. A row of `PRIORS` has another prior on the codes of `default`, or other samples of its prior: rows that
  differ in the section `sample` alone share one prior. The rows of guidance need images with classes.
- better: whether the mean rFID (gFID for priors) is below that of `default` by more than the sum of both deviations.

The weights of LPIPS and Inception are those that `movq weights --fetch` downloads. The tokenizers of all rows come
before the first prior, and all rows of a seed before the next seed. Each row is made by the commands of movq: a
benchmark that was killed goes on from the last checkpoint of its run when it is started again. A row whose settings
have changed is measured again, in a folder of its own.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console as Terminal
from rich.table import Table

from benchmarks import photos
from benchmarks.photos import Bench
from movq_cli import checkpoints, devices, presets
from movq_cli.console import Console
from movq_cli.data import loader
from movq_cli.data.shards import PreparedSet
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.evaluation.perturbed import perturbed_fid
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import SINGLE_PROCESS

_BATCH = 50
"""Number of images that are reconstructed at one time."""

ROWS: dict[str, tuple[str, ...]] = {
    "default": (),
    "rotation": ("train_vq.quantizer_gradient=rotation",),
    "unit-codes": ("vq.normalize_codes=true",),
    "codebook-rate": ("train_vq.codebook_learning_rate=1e-3",),
    "entropy": ("train_vq.entropy_weight=0.02", "train_vq.entropy_temperature=1.0"),
    "simvq": ("vq.quantizer=simvq",),
    "simvq-rotation": ("vq.quantizer=simvq", "train_vq.quantizer_gradient=rotation"),
    "fsq": ("vq.quantizer=fsq", "vq.fsq_levels=[8,8,8]"),
    "perturbed": ("train_vq.perturbed_images=0.1", "train_vq.perturbation_neighbors=32"),
    "lecam": ("train_vq.lecam_weight=0.001",),
    "group-norm": ("train_vq.discriminator_norm=group",),
    "blur": ("train_vq.discriminator_norm=group", "train_vq.discriminator_blur=true"),
    "r1": ("train_vq.r1_weight=1.0",),
    "rotation-unit-codes": ("train_vq.quantizer_gradient=rotation", "vq.normalize_codes=true"),
    "combined": (
        "train_vq.quantizer_gradient=rotation",
        "vq.normalize_codes=true",
        "train_vq.perturbed_images=0.1",
        "train_vq.perturbation_neighbors=32",
        "train_vq.lecam_weight=0.001",
    ),
    "augment": ("train_vq.discriminator_augmentation=[color,translation,cutout]",),
}
"""Rows of stage 1: overrides of the preset."""

PRIORS: dict[str, tuple[str, ...]] = {
    "arccos": ("train_prior.mask_schedule=arccos", "sample.mask_schedule=arccos"),
    "arccos-training": ("train_prior.mask_schedule=arccos",),
    "arccos-sampling": ("sample.mask_schedule=arccos",),
    "linear": ("train_prior.mask_schedule=linear", "sample.mask_schedule=linear"),
    "square": ("train_prior.mask_schedule=square", "sample.mask_schedule=square"),
    "halton": ("sample.order=halton",),
    "random": ("sample.order=random",),
    "32-steps": ("sample.steps=32",),
    "arccos-32-steps": ("sample.steps=32", "sample.mask_schedule=arccos"),
    "halton-32-steps": ("sample.steps=32", "sample.mask_schedule=arccos", "sample.order=halton"),
    "guidance": ("sample.guidance=1",),
    "guidance-power-cosine": ("sample.guidance=4", "sample.guidance_schedule=power-cosine"),
    "guidance-interval": ("sample.guidance=1", "sample.guidance_interval=0.2-0.8"),
    "qk-norm": ("prior.qk_norm=true",),
    "dropout": ("prior.dropout=0.1",),
    "auto": ("prior.mode=auto",),
    "random-order": ("prior.mode=auto", "train_prior.random_order=0.5-0.75"),
}
"""Rows of stage 2, on the codes of `default`: overrides of the preset."""


STRAIGHT_THROUGH = "train_vq.quantizer_gradient=straight-through"
"""Override of all rows that do not name another gradient; the presets `photos-*` have the rotation trick."""


class Job(NamedTuple):
    """A run of the benchmark: a row with a seed, in one of both stages."""

    stage: str  # "tokenizer" or "prior"
    row: str
    seed: int

    @property
    def key(self) -> str:
        """Name of the results of this run within its row."""
        return f"{self.stage}-{self.seed}"


def jobs(rows: Sequence[str], seeds: Sequence[int], *, with_prior: bool) -> Iterator[Job]:
    """Yield the runs in their order: tokenizers before priors, and a seed of all rows before the next seed."""
    for stage in ("tokenizer", "prior") if with_prior else ("tokenizer",):
        for seed in seeds:
            yield from (Job(stage, row, seed) for row in rows if stage == "prior" or row in ROWS)


def changes_of(job: Job) -> tuple[str, ...]:
    """Return the overrides of a run; a row of stage 2 has the tokenizer of `default`."""
    # The FIDs are computed after the training, from features of the real images that all rows share.
    tokenizer = (STRAIGHT_THROUGH, *ROWS.get(job.row, ()), f"train_vq.seed={job.seed}", "train_vq.evaluate_every=0")
    return tokenizer if job.stage == "tokenizer" else (*tokenizer, *prior_changes(job), *sample_changes(job))


def prior_changes(job: Job) -> tuple[str, ...]:
    """Return the overrides of the training of a prior."""
    changed = [change for change in PRIORS.get(job.row, ()) if not change.startswith("sample.")]
    return (f"train_prior.seed={job.seed}", "train_prior.evaluate_every=0", *changed)


def sample_changes(job: Job) -> tuple[str, ...]:
    """Return the overrides of the samples of a prior."""
    return tuple(change for change in PRIORS.get(job.row, ()) if change.startswith("sample."))


def digest(bench: Bench, job: Job, sections: Set[str] | None = None) -> str:
    """Return eight digits that identify the source, the settings and the seed of a run.

    Args:
        bench: Settings of all rows.
        job: The run.
        sections: Sections of the preset that matter; those of the stage of the run if it is None.
    """
    settings = presets.load(bench.preset, (*bench.overrides, *changes_of(job)))
    sections = sections or (_STAGE_1 if job.stage == "tokenizer" else _STAGE_1 | _STAGE_2 | {"sample"})
    # Without the defaults, so that a new setting that changes nothing does not make measured rows obsolete.
    chosen = settings.model_dump_json(include=set(sections), exclude_defaults=True)
    parts = (Path(bench.source).name, str(bench.held_out), chosen)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


_STAGE_1 = {"data", "vq", "train_vq"}
"""Sections of a preset on which a tokenizer depends."""

_STAGE_2 = {"views", "prior", "train_prior"}
"""Sections of a preset on which a prior depends beside its tokenizer."""


def tokenizer_job(job: Job) -> Job:
    """Return the run that trains the tokenizer of a run; a row of stage 2 has the tokenizer of `default`."""
    return Job("tokenizer", job.row if job.row in ROWS else "default", job.seed)


def folder_name(bench: Bench, job: Job) -> str:
    """Return the name of a run's folder: that of the tokenizer, or in stage 2 that of the samples."""
    return f"{job.row}-{job.seed}-{digest(bench, job)}"


def measure(bench: Bench, job: Job, shares: Sequence[float]) -> dict[str, Any]:
    """Make a run or resume it, and return its results.

    Args:
        bench: Settings of all rows.
        job: The run.
        shares: Shares of replaced codes over which the perturbed rFID is averaged.
    """
    own = tokenizer_job(job)
    tokenizer = folder_name(bench, own)
    # Also for a prior: if the results come from another machine, its tokenizer is recorded, but it is not here.
    results = photos.train(bench, tokenizer, changes_of(own))
    if job.stage == "prior":
        # The folder of a prior has no name of a row, since several rows may draw their samples from one prior.
        prior = f"prior-{job.seed}-{digest(bench, job, _STAGE_1 | _STAGE_2)}"
        name = folder_name(bench, job)
        trained = photos.train_prior(bench, tokenizer, prior, prior_changes(job))
        return {**trained, **photos.sample(bench, prior, name, sample_changes(job))}
    with torch.device("meta"):
        model = Tokenizer(presets.load(bench.preset, (*bench.overrides, *changes_of(job))).vq)
    rfid, *perturbed = fids(bench, tokenizer, (0.0, *shares)).values()
    return {
        **results,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rfid": rfid,
        "perturbed_rfid": statistics.mean(perturbed),
        "perturbed_rfids": dict(zip(map(str, shares), perturbed, strict=True)),
    }


def fids(bench: Bench, row: str, shares: Sequence[float]) -> dict[float, float]:
    """Return the FIDs of reconstructions of all held-out images, by the share of replaced codes."""
    options = dict(zip(bench.options[::2], bench.options[1::2], strict=True))
    device = devices.select(options.get("--device"))
    weights = Path(options["--weights"]) if "--weights" in options else None
    size, console = bench.settings.vq.image_size, Console(quiet=True)
    real = ImageSet("real", str(bench.data), "val", crop=size, console=console)
    evaluator = FIDEvaluator.of(real, bench.work / "features", weights, device, SINGLE_PROCESS, console)
    model = checkpoints.load_tokenizer(bench.run(row).weights).to(device)
    split = PreparedSet.open(bench.data).split("val")
    blocks = torch.arange(len(split)).split(_BATCH)
    images = (loader.center_crops(split, block.tolist(), resolution=size, device=device) for block in blocks)
    return perturbed_fid(model, images, evaluator, shares)


def table(rows: dict[str, Any], names: Sequence[str]) -> Table:
    """Return the table of the results; a value that is not measured yet is named so."""
    made = Table("row", "rFID", "LPIPS", "PSNR", "usage", "perturbed rFID", "gFID", "better", "parameters")
    for name in names:
        row = rows.get(name, {})
        is_tokenizer = name in ROWS
        cells = [
            _cell(_values(row, "tokenizer", key), digits, is_tokenizer=is_tokenizer) for key, digits in _COLUMNS.items()
        ]
        cells.append(_cell(_gfids(row), 1))
        criterion = _rfids if is_tokenizer else _gfids
        cells.append("" if name == "default" else _better(criterion(row), criterion(rows.get("default", {}))))
        parameters = _values(row, "tokenizer", "parameters")
        made.add_row(name, *cells, f"{parameters[0]:,}" if parameters else "")
    return made


_COLUMNS = {"rfid": 2, "lpips": 4, "psnr": 2, "usage": 3, "perturbed_rfid": 1}
"""Columns of stage 1, and their decimals."""


def _values(row: dict[str, Any], stage: str, key: str) -> list[Any]:
    """Return the values of all seeds of a row that are measured."""
    return [results[key] for name, results in sorted(row.items()) if name.startswith(f"{stage}-") and key in results]


def _rfids(row: dict[str, Any]) -> list[float]:
    return _values(row, "tokenizer", "rfid")


def _gfids(row: dict[str, Any]) -> list[float]:
    return _values(row, "prior", "fid")


def _cell(values: Sequence[float], digits: int, *, is_tokenizer: bool = True) -> str:
    """Return mean, standard deviation and number of seeds as text."""
    if not values:
        return "not measured" if is_tokenizer else ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation} ({len(values)})"


def _better(values: Sequence[float], base: Sequence[float]) -> str:
    """Return whether values are below the base by more than the deviations of both; empty if a deviation is unknown."""
    if len(values) < 2 or len(base) < 2:
        return ""
    spread = statistics.stdev(values) + statistics.stdev(base)
    difference = statistics.mean(base) - statistics.mean(values)
    return "yes" if difference > spread else "worse" if -difference > spread else "within the spread"


def main() -> None:
    """Make the runs that are not recorded yet, recording each, then print the table."""
    parser = photos.argument_parser("Measure techniques beyond the paper, one row each.", Path("runs/quality"))
    names = (*ROWS, *PRIORS)
    parser.add_argument("--rows", nargs="*", choices=names, default=names, help="rows to measure [default: all]")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="seeds of each row [default: 0 1 2]")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.3], help="shares of replaced codes [default: 0.3]"
    )
    parser.add_argument("--without-prior", action="store_true", help="measure stage 1 alone")
    parser.add_argument("--show", action="store_true", help="print the table of what is measured, and end")
    given = parser.parse_args()
    bench = photos.bench_of(given)
    path = bench.report(given.out, "quality-")
    missing = (
        [] if given.show else list(unmeasured(bench, path, given.rows, given.seeds, with_prior=not given.without_prior))
    )
    if missing:
        photos.prepare(bench)
    for job in missing:
        results = {"digest": digest(bench, job), **measure(bench, job, given.shares)}
        rows = photos.recorded(path)  # Another process may have written other rows in the meantime.
        photos.record(bench, path, {**rows, job.row: {**rows.get(job.row, {}), job.key: results}})
    rows = photos.recorded(path)
    Terminal().print(table(rows, [name for name in names if name in rows]))
    if absent := [name for name in names if name not in rows]:
        print(f"not measured yet: {', '.join(absent)}")


def unmeasured(
    bench: Bench, path: Path, rows: Sequence[str], seeds: Sequence[int], *, with_prior: bool
) -> Iterator[Job]:
    """Yield the runs that a file of results does not have, or has with other settings."""
    known = photos.recorded(path)
    for job in jobs(rows, seeds, with_prior=with_prior):
        if known.get(job.row, {}).get(job.key, {}).get("digest") != digest(bench, job):
            yield job


if __name__ == "__main__":
    main()
