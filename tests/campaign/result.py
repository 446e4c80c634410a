"""The result of one case of the campaign."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """What was tried, and what was wrong with the end of it."""

    name: str
    problems: list[str] = field(default_factory=list)
    """Sentences that begin with their kind: lost, unequal, silent, unclear or left over."""


KINDS = ("lost", "unequal", "silent", "unclear", "left over")
