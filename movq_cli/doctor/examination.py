"""The examination of a run: every rule that applies to its kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from movq_cli.doctor.rules import RULES
from movq_cli.run_history import RunHistory


@dataclass(frozen=True)
class Finding:
    """A problem of a run."""

    rule: str
    """Name of the rule."""
    title: str
    evidence: str
    remedy: str
    """Command that trains without the problem."""
    step: int
    picture: Path | None
    """Picture that shows it; None without one."""

    def as_json(self) -> dict[str, Any]:
        """Return the finding as a JSON object."""
        return {
            "rule": self.rule,
            "title": self.title,
            "evidence": self.evidence,
            "remedy": self.remedy,
            "step": self.step,
            "picture": None if self.picture is None else str(self.picture),
        }


def examine(history: RunHistory) -> list[Finding]:
    """Return what is wrong with a run; empty if it is healthy, or too short to say."""
    found = []
    for rule in RULES:
        if history.manifest.kind in rule.kinds and history.manifest.imported is None:
            symptom = rule.check(history)
            if symptom is not None:
                found.append(
                    Finding(rule.key, rule.title, symptom.evidence, symptom.remedy, symptom.step, symptom.picture)
                )
    return found


def rule_count(history: RunHistory) -> int:
    """Return the number of rules that apply to a run."""
    return sum(history.manifest.kind in rule.kinds for rule in RULES)
