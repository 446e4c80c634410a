"""The page of a run that a training writes after each validation, and its warnings by the rules of `movq doctor`."""

from __future__ import annotations

import time

from movq_cli.console import Console
from movq_cli.doctor import examination
from movq_cli.doctor.rules import adversary
from movq_cli.errors import BadRequestError
from movq_cli.report import library, page
from movq_cli.run_history import RunHistory
from movq_cli.runs import Run
from movq_cli.training_settings import TrainSettings

_LARGEST_SHARE = 0.02
"""Largest share of the time of a training that the page takes: between two of its pages there is the rest."""

_WARNED_BY_THE_STAGE = {adversary.LEARNS_NOTHING.key}
"""Rules of which a stage warns itself, at every log line."""


class Monitor:
    """Writes the page of a run while it is trained, and warns once of each finding.

    Whatever goes wrong in it costs a warning, and not the run.

    Args:
        run: Run folder.
        settings: Training settings, of which `report` is used.
        console: Console for warnings.
        is_first: Whether this is rank 0; the others do nothing.

    Raises:
        BadRequestError: The setting `report` is true and the plotting library is not installed.
    """

    def __init__(self, run: Run, settings: TrainSettings, console: Console, *, is_first: bool) -> None:
        self.run = run
        self.console = console
        self.is_first = is_first
        self.writes_page = wants_report(settings.report)
        self._warned = set(_WARNED_BY_THE_STAGE)
        self._has_failed = False
        self._next_page = 0.0

    def observe(self, *, is_last: bool) -> None:
        """Write the page and print new warnings, after a validation.

        Args:
            is_last: Whether it is the last validation, whose page is written however long the last one took.
        """
        if not self.is_first:
            return
        try:
            history = RunHistory.read(self.run.folder)
            for finding in examination.examine(history):
                if finding.rule not in self._warned:
                    self._warned.add(finding.rule)
                    self.console.warn(f"{finding.title}. {finding.evidence} Remedy: {finding.remedy}")
            began = time.perf_counter()
            if self.writes_page and (is_last or began >= self._next_page):
                page.write(self.run.folder / "report.html", [history], None)
                now = time.perf_counter()
                self._next_page = now + (now - began) / _LARGEST_SHARE
        except Exception as error:  # The page is a convenience, and the training is not.
            if not self._has_failed:
                reason = " ".join(str(error).split()) or type(error).__name__
                self.console.warn(f"the page or the examination of the run failed, and the training goes on: {reason}")
            self._has_failed = True


def wants_report(setting: bool | None) -> bool:
    """Return whether the page is written during training.

    Args:
        setting: The setting `report`; None writes it if the plotting library is installed.

    Raises:
        BadRequestError: The setting is true and the library is not installed.
    """
    is_installed = library.is_installed()
    if setting and not is_installed:
        raise BadRequestError(
            "report=true, but vl-convert-python is not installed", "Install it: pip install 'movq[report]'."
        )
    return is_installed if setting is None else setting
