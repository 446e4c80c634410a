"""Model cards: the README of published weights, with what they are, how they were trained, and how they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from movq_cli import digested_lines
from movq_cli.checkpoints import PriorHeader
from movq_cli.models.priors import CodePrior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.run_manifest import COMMAND, Kind, RunManifest
from movq_cli.runs import Run


def of_tokenizer(
    model: Tokenizer, weights: Path | None, name: str, made: str, use: str, notes: Sequence[str] = ()
) -> str:
    """Return the model card of a tokenizer.

    Args:
        model: The tokenizer.
        weights: Its weight file, beside which the manifest and the log of its run are looked for; None = there is none.
        name: Name of the tokenizer, for the title.
        made: Sentence that says which command wrote the files.
        use: Text that says how the tokenizer is loaded, in Markdown.
        notes: Differences between the files and the tokenizer, in words.
    """
    settings = model.settings
    return "\n".join(
        [
            f"# Image tokenizer {name}",
            "",
            made,
            "",
            "| property | value |",
            "| --- | --- |",
            f"| pixels of a code position | {settings.factor} x {settings.factor} |",
            f"| codes of a position | {settings.chunks} |",
            f"| codebook | {settings.codebook_size:,} entries of {settings.code_dim} channels |",
            f"| image range | [{settings.image_range}] |",
            f"| training resolution | {settings.image_size} |",
            f"| parameters | {sum(parameter.numel() for parameter in model.parameters()):,} |",
            "",
            *[f"Note: {note}.\n" for note in notes],
            "## Use",
            "",
            use,
            "",
            *_origin(weights, "vq"),
            *_settings(settings.model_dump_json(indent=2)),
        ]
    )


def of_prior(
    model: CodePrior, header: PriorHeader, tokenizer: Tokenizer, weights: Path | None, name: str, made: str, use: str
) -> str:
    """Return the model card of a prior; see `of_tokenizer`.

    Args:
        model: The prior.
        header: Metadata of its weight file.
        tokenizer: The tokenizer whose codes it models.
        weights: Its weight file; None = there is none.
        name: Name of the prior, for the title.
        made: Sentence that says which command wrote the files.
        use: Text that says how the prior is loaded, in Markdown.
    """
    shape = header.shape
    classes = ", ".join(header.classes[:_NAMED_CLASSES]) + (" ..." if len(header.classes) > _NAMED_CLASSES else "")
    return "\n".join(
        [
            f"# Image prior {name}",
            "",
            made,
            "",
            "| property | value |",
            "| --- | --- |",
            f"| mode | {header.prior.mode} |",
            f"| codes of an image | {shape.height} x {shape.width} positions of {shape.chunks} |",
            f"| classes | {f'{len(header.classes):,} ({classes})' if header.classes else 'none'} |",
            f"| image size | {tokenizer.settings.image_size} |",
            f"| parameters | {sum(parameter.numel() for parameter in model.parameters()):,} |",
            f"| SHA-256 of the tokenizer | {header.tokenizer} |",
            "",
            "## Use",
            "",
            use,
            "",
            *_origin(weights, "prior"),
            *_settings(header.prior.model_dump_json(indent=2)),
        ]
    )


_NAMED_CLASSES = 20
"""Number of classes that a model card names."""


def _settings(text: str) -> list[str]:
    return ["## Settings", "", "```json", text, "```", ""]


def _origin(weights: Path | None, kind: Kind) -> list[str]:
    """Return the section of the model card about the origin of the weights, and that about their metrics."""
    if weights is None:
        return []
    run = Run(weights.parent, kind)
    manifest = _manifest(run)
    if manifest is None:
        return []
    if manifest.imported is not None:
        origin = manifest.imported
        return [
            "## Origin",
            "",
            f"Imported from `{origin.source}` (SHA-256 {origin.sha256}), family {origin.family}.",
            f"License: {origin.license}.",
            "",
        ]
    lines = [
        "## Training",
        "",
        f"`movq {COMMAND[kind]} --preset {manifest.preset}`, {manifest.step:,} steps, movq {manifest.version};",
        f"data: the prepared set with the hash {manifest.data}.",
        "",
    ]
    metrics = _last_validation(run)
    if metrics:
        lines += ["## Metrics of the last validation", "", "| metric | value |", "| --- | --- |"]
        lines += [f"| {name} | {value:.4f} |" for name, value in metrics.items()] + [""]
    return lines


def _last_validation(run: Run) -> dict[str, float]:
    """Return the scalar metrics of the last validation in the log of a run; empty if there is none."""
    try:
        records = [digested_lines.decode(line) for line in run.log.read_bytes().splitlines()]
        found = [record["validation"] for record in records if "validation" in record]
        return {name: value for name, value in found[-1].items() if isinstance(value, float)} if found else {}
    except (OSError, ValueError, TypeError):
        return {}  # The log is for people, so that a damaged one costs no more than this table.


def _manifest(run: Run) -> RunManifest | None:
    """Return the manifest of a run; None if the folder is not one of a run of this kind. A damaged one is an error."""
    manifest = run.read() if run.manifest_file.exists() else None
    return manifest if manifest is not None and manifest.kind == run.kind else None
