"""`movq doctor`: what is wrong with a run, with the evidence and a remedy."""

from __future__ import annotations

from pathlib import Path

from movq_cli.console import Console
from movq_cli.doctor.examination import Finding, examine, rule_count
from movq_cli.run_history import RunHistory


def doctor(folder: Path, console: Console) -> bool:
    """Examine a run, report the findings, and return whether it is healthy.

    Args:
        folder: Run folder.
        console: Console for the result.

    Raises:
        BadRequestError: The folder is not a run folder.
    """
    history = RunHistory.read(folder)
    if history.damage is not None:
        console.warn(history.damage)
    findings = examine(history)
    data = {
        "run": str(folder),
        "step": history.last_step,
        "rules": rule_count(history),
        "findings": [finding.as_json() for finding in findings],
    }
    console.result(data, "\n".join(map(_text, findings)) or f"{folder}\tno findings of {rule_count(history)} rules")
    return not findings


def _text(finding: Finding) -> str:
    lines = [f"{finding.title} ({finding.rule})", f"  evidence: {finding.evidence}"]
    if finding.picture is not None:
        lines.append(f"  picture: {finding.picture}")
    return "\n".join([*lines, f"  remedy: {finding.remedy}"])
