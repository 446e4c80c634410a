"""The page: its sections for one run or for several, and the HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from movq_cli.console import printable
from movq_cli.doctor import examination
from movq_cli.errors import MovqError
from movq_cli.files import atomic_write
from movq_cli.report import charts, curves, library, pictures, summary
from movq_cli.report.blocks import Block, Chart, Finding, Findings, Section, Text
from movq_cli.run_history import RunHistory
from movq_cli.version import __version__

if TYPE_CHECKING:
    import torch

TEMPLATES = Path(__file__).parent

_BINS = ("0 to 20%", "20 to 40%", "40 to 60%", "60 to 80%", "80 to 100%")
"""Intervals of the share of masked codes."""


def write(path: Path, histories: Sequence[RunHistory], device: torch.device | None) -> None:
    """Write the page of one run, or of several.

    Args:
        path: File of the page.
        histories: The runs, at least one.
        device: Device of the models, for the parts that need the weights; None leaves these parts out.

    Raises:
        BadRequestError: The plotting library is not installed.
        FailureError: The file cannot be written.
    """
    atomic_write(path, render(histories, device).encode("utf-8", "replace"))


def render(histories: Sequence[RunHistory], device: torch.device | None) -> str:
    """Return the page of one run, or of several, as HTML; see `write`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    script = library.javascript()
    names = names_of(histories)
    if len(histories) == 1:
        title, sections = histories[0].name, _sections_of_run(histories[0], device)
    else:
        title, sections = f"{len(histories)} runs: {', '.join(names)}", _sections_of_runs(histories, names)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html").render(
        title=printable(title),
        sections=sections,
        version=__version__,
        library=script,
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        is_single=len(histories) == 1,
    )


def names_of(histories: Sequence[RunHistory]) -> list[str]:
    """Return a name for each run: that of its folder, or its path where two have the same."""
    names = [history.name for history in histories]
    if len(set(names)) == len(names):
        return [printable(name) for name in names]
    return [printable(str(history.run.folder)) for history in histories]


def _sections_of_run(history: RunHistory, device: torch.device | None) -> list[Section]:
    is_vq = history.manifest.kind == "vq"
    sections = [
        Section("run", "What this run is", [summary.facts(history), *summary.sessions(history)]),
        Section("diagnosis", "Diagnosis", [_findings([history], [""])]),
        Section("metrics", "Metrics", [summary.metrics(history)]),
        Section("pictures", "Pictures", [pictures.film(history)]),
        Section("curves", "Curves", curves.of_run(history) or [Text("Curves", "The log has no losses yet.")]),
    ]
    if is_vq:
        sections.append(Section("codebook", "Codebook", _model_blocks(history, device, "Codebook")))
    else:
        sections.append(Section("loss", "What the prior has learned", _loss_blocks(history)))
        sections.append(Section("samples", "Samples", _model_blocks(history, device, "Samples")))
    return [*sections, Section("settings", "Settings", [summary.settings(history)])]


def _model_blocks(history: RunHistory, device: torch.device | None, title: str) -> Sequence[Block]:
    """Return the parts that need the weights; what prevents them stands in their place."""
    if device is None:
        return [Text(title, f"This part needs the weights: movq report {history.run.folder}")]
    if not history.run.weights.is_file():
        return [Text(title, "The run has no weights yet.")]
    from movq_cli.report import codebook, samples

    try:
        part = codebook if history.manifest.kind == "vq" else samples
        return part.blocks(history, device)
    except (MovqError, OSError) as error:
        return [Text(title, f"This part is missing: {error}")]


def _loss_blocks(history: RunHistory) -> list[Block]:
    """Return the last validation's loss by the share of masked codes and by channel, beside the entropies."""
    last, blocks = history.last_validation, list[Block]()
    by_share = last.get("loss_by_masked_share")
    if isinstance(by_share, list) and len(by_share) == len(_BINS):
        groups = {"loss of the last validation": by_share}
        entropy = last.get("unigram_entropy")
        if isinstance(entropy, float):
            groups["unigram entropy"] = [entropy] * len(_BINS)
        note = (
            "Loss where so many codes are masked. Healthy: it rises from left to right, and lies below the unigram "
            "entropy most where few codes are masked: the prior uses what is visible. A flat line at the entropy means "
            "that it has learned frequencies alone. 0 is an interval without images."
        )
        blocks.append(
            charts.of_groups("Loss by the share of masked codes", note, groups, _BINS, y_title="nats per code")
        )
    channels, entropies = last.get("loss_of_channels"), last.get("unigram_entropy_of_chunks")
    if isinstance(channels, list):
        labels = [f"channel {index}" for index in range(len(channels))]
        groups = {"loss of the last validation": channels}
        if isinstance(entropies, list) and len(entropies) == len(channels):
            groups["unigram entropy of the channel"] = entropies
        note = "Healthy: every channel lies below its own entropy, and none stands out."
        blocks.append(charts.of_groups("Loss by channel", note, groups, labels, y_title="nats per code"))
    return blocks or [Text("Loss", "The run has no validation yet.")]


def _sections_of_runs(histories: Sequence[RunHistory], names: Sequence[str]) -> list[Section]:
    drawn: list[Chart] = curves.of_runs(histories, names)
    films = [
        Section(f"pictures-{index}", f"Pictures of {name}", [pictures.film(history)])
        for index, (history, name) in enumerate(zip(histories, names, strict=True))
    ]
    return [
        Section("run", "What these runs are", [summary.compared(histories, names)]),
        Section("diagnosis", "Diagnosis", [_findings(histories, names)]),
        Section("settings", "What differs", [summary.differences(histories, names)]),
        Section("curves", "Curves over each other", drawn or [Text("Curves", "The logs have no losses yet.")]),
        *films,
    ]


def _findings(histories: Sequence[RunHistory], names: Sequence[str]) -> Findings:
    """Return what is wrong with the runs."""
    found = [
        Finding(name if len(names) > 1 else "", finding.title, finding.evidence, finding.remedy)
        for history, name in zip(histories, names, strict=True)
        for finding in examination.examine(history)
    ]
    checked = sum(examination.rule_count(history) for history in histories)
    if found:
        note = f"{len(found)} of {checked} rules have found something. movq doctor prints the same."
    elif all(len(history.series("loss")) for history in histories):
        note = f"Healthy: none of {checked} rules has found anything."
    else:
        note = "There is no training in the log that could be examined."
    return Findings("", note, found, checked)
