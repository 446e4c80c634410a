"""Tables about a run: its facts, its sessions, its metrics beside the targets, and how its settings differ."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from movq_cli.data.shards import MANIFEST, DatasetManifest
from movq_cli.errors import MovqError
from movq_cli.report.blocks import Block, Table
from movq_cli.run_history import RunHistory
from movq_cli.run_manifest import COMMAND

_NAMES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "lpips_vgg": "LPIPS by VGG",
    "rfid": "rFID",
    "fid": "FID",
    "color_error": "error of the mean color, levels of 256",
    "saturation": "saturation over that of the originals",
    "usage": "codebook entries in use",
    "perplexity": "perplexity of the codes",
    "loss": "loss, nats per predicted code",
    "unigram_entropy": "unigram entropy of the codes, nats",
}
"""Names of metrics for people, in the order in which they are listed."""

_HIGHER_IS_BETTER = {"psnr", "ssim", "usage", "perplexity"}
_LOWER_IS_BETTER = {"lpips", "lpips_vgg", "rfid", "fid", "color_error", "loss"}


def facts(history: RunHistory) -> Table:
    """Return what a run is."""
    return Table("", "", ["", ""], [[name, text] for name, text in _facts(history) if text])


def _facts(history: RunHistory) -> Iterator[tuple[str, str]]:
    manifest, settings = history.manifest, history.manifest.settings
    stage = {"vq": "tokenizer (stage 1)", "prior": "prior (stage 2)"}[manifest.kind]
    yield "run", str(history.run.folder)
    yield "what", f"{stage}, preset {manifest.preset}" + (f": {settings.description}" if settings.description else "")
    yield "command", history.command
    early = f" early, {manifest.validations_since_best} validations after the best" if manifest.stopped_early else ""
    yield "progress", f"step {history.last_step:,} of {manifest.steps:,}, {manifest.status}{early}"
    yield "data", _data(history)
    yield "model", _model(history)
    hardware = dict.fromkeys(
        session.device + (f", {session.ranks} processes" if session.ranks > 1 else "")
        for session in history.sessions
        if session.device
    )
    yield "hardware", "; ".join(hardware)
    yield "cost", _cost(history)
    versions = dict.fromkeys(
        f"movq {session.values['version']}, PyTorch {session.values['torch']}"
        for session in history.sessions
        if {"version", "torch"} <= session.values.keys()
    )
    yield "versions", "; ".join(versions) or f"movq {manifest.version}"
    yield "started", _time(manifest.started) + (f", finished {_time(manifest.finished)}" if manifest.finished else "")
    if manifest.best_score is not None and manifest.best_step is not None:
        yield "best", f"{manifest.best_by} {manifest.best_score:.4g} at step {manifest.best_step:,}"
    if manifest.imported is not None:
        yield "imported from", manifest.imported.source


def _data(history: RunHistory) -> str:
    root, expected = history.manifest.settings.data.path, history.manifest.data
    if expected is None:
        return ""
    text = f"{root} (hash {expected[:12]})"
    try:
        if (root / MANIFEST).is_file():
            found = DatasetManifest.read(root)
            if found.hash != expected:
                return f"{text}; the set in this folder is another one now"
            counts = f"{found.counts['train']:,} training and {found.counts['val']:,} validation images"
            classes = f", {len(found.classes)} classes" if found.classes else ""
            return f"{text}: {counts}{classes}, from {found.source}"
    except (MovqError, OSError):
        pass  # The page does not need the set.
    return text


def _model(history: RunHistory) -> str:
    vq, prior = history.manifest.settings.vq, history.manifest.settings.prior
    shape = vq.code_shape
    codes = f"{shape.height} x {shape.width} x {shape.chunks} codes of {shape.codebook_size:,} entries"
    image = f"images of {vq.image_size.in_words}"
    parts = [f"{image}, {codes}"]
    if history.manifest.kind == "prior":
        parts.append(
            f"mode {prior.mode}, {prior.layers} layers of width {prior.width}, {prior.classes or 'no'} classes"
        )
    for session in history.sessions[-1:]:
        parameters = session.values.get("parameters")
        if isinstance(parameters, Mapping) and isinstance(parameters.get("total"), int):
            parts.append(f"{parameters['total']:,} parameters")
    return "; ".join(parts)


def _cost(history: RunHistory) -> str:
    if not history.lines:
        return ""
    ranks = max(session.ranks for session in history.sessions)
    sessions = len(history.sessions)
    parts = [duration(history.hours) + (f" in {sessions} sessions" if sessions > 1 else "")]
    if ranks > 1:
        parts.append(f"{sum(session.hours * session.ranks for session in history.sessions):.1f} device hours")
    rate = history.series("images_per_second").values
    if rate:
        parts.append(f"median {statistics.median(rate):.3g} images/s")
    memory = history.series("peak_memory_gib").values
    if memory:
        parts.append(f"at most {max(memory):.1f} GiB of GPU memory")
    return ", ".join(parts)


def sessions(history: RunHistory) -> list[Block]:
    """Return the sessions and the changes of the settings, if there is more than a start."""
    blocks: list[Block] = []
    if len(history.sessions) > 1:
        rows = [
            [
                f"{session.step:,}",
                _time(session.started.isoformat()),
                duration(session.hours),
                session.device or "-",
                session.command or "-",
            ]
            for session in history.sessions
        ]
        blocks.append(
            Table("Sessions", "Each start and resumption.", ["from step", "at", "took", "on", "command"], rows)
        )
    changes = [
        [f"{change.step:,}", _time(change.time), change.branched_from or "-", _changes(change.settings)]
        for change in history.manifest.history
    ]
    if changes:
        columns = ["after step", "at", "from", "settings"]
        blocks.append(Table("Changes since the start", "", columns, changes))
    return blocks


def _changes(settings: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name}: {before} → {after}" for name, (before, after) in settings.items()) or "none"


def metrics(history: RunHistory) -> Table:
    """Return the metrics of the last validation and the best ones, beside the published targets."""
    target = history.manifest.settings.target
    is_vq = history.manifest.kind == "vq"
    targets = target.of_reconstructions() if is_vq else target.of_samples(history.manifest.settings.prior.mode)
    rows = []
    for key, name in _NAMES.items():
        series = history.series(key, "validation")
        if not len(series) and key not in targets:
            continue
        last = f"{series.values[-1]:.4g} (step {series.steps[-1]:,})" if len(series) else "not measured"
        rows.append(
            [name, last, _best(key, series.values, series.steps), f"{targets[key]:g}" if key in targets else "-"]
        )
    source = f" The targets are of {target.source}." if targets and target.source else ""
    note = (
        "Metrics during training are of few images; movq evaluate measures what can be compared with published "
        f"values.{source}"
    )
    return Table("Metrics", note, ["metric", "last", "best", "target"], rows)


def _best(key: str, values: Sequence[float], steps: Sequence[int]) -> str:
    if not values or key not in _HIGHER_IS_BETTER | _LOWER_IS_BETTER:
        return "-"
    best = max(values) if key in _HIGHER_IS_BETTER else min(values)
    return f"{best:.4g} (step {steps[values.index(best)]:,})"


def settings(history: RunHistory) -> Table:
    """Return all settings of a run."""
    rows = [[name, _value(value)] for name, value in flat(history).items()]
    return Table("All settings", "", ["setting", "value"], rows, is_folded=True)


def differences(histories: Sequence[RunHistory], names: Sequence[str]) -> Table:
    """Return the settings in which runs differ."""
    all_flat = [flat(history) for history in histories]
    keys = dict.fromkeys(key for values in all_flat for key in values)
    rows = [
        [key, *(_value(values.get(key)) for values in all_flat)]
        for key in keys
        if len({_value(values.get(key)) for values in all_flat}) > 1
    ]
    note = "" if rows else "These runs have equal settings."
    return Table("Settings that differ", note, ["setting", *names], rows)


def compared(histories: Sequence[RunHistory], names: Sequence[str]) -> Table:
    """Return the last metrics of several runs side by side."""
    rows = [
        ["command", *(f"movq {COMMAND[history.manifest.kind]}" for history in histories)],
        ["steps", *(f"{history.last_step:,} of {history.manifest.steps:,}" for history in histories)],
        ["time", *(duration(history.hours) for history in histories)],
        ["hardware", *(history.sessions[-1].device if history.sessions else "-" for history in histories)],
    ]
    for key, name in _NAMES.items():
        series = [history.series(key, "validation") for history in histories]
        if any(map(len, series)):
            rows.append([name, *(f"{values.values[-1]:.4g}" if len(values) else "-" for values in series)])
    return Table("Side by side", "Metrics are those of the last validation.", ["", *names], rows)


def flat(history: RunHistory) -> dict[str, Any]:
    """Return the settings of a run by their dotted names."""
    return dict(_leaves(history.manifest.settings.model_dump(mode="json"), ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(value: object) -> str:
    return "null" if value is None else str(value)


def duration(hours: float) -> str:
    """Return a duration in words."""
    seconds = round(hours * 3600)
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{hours:.1f} h"


def _time(text: str) -> str:
    """Return a time in ISO 8601 without its fractions of a second."""
    return f"{text[:19].replace('T', ' ')} UTC" if len(text) >= 19 else text
