"""The file of the trials of a search: optuna's journal, each line with a digest. Importing it imports optuna."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from movq_cli import digested_lines
from movq_cli.data.tuned_settings import JOURNAL_REMEDY
from movq_cli.errors import BadRequestError


class DigestedJournal(JournalFileBackend):
    """Optuna's journal, which has a digest in each line; optuna passes over fields that it does not know."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries with their digests."""
        super().append_logs(list(map(digested_lines.with_digest, logs)))


def open_journal(path: Path) -> JournalStorage:
    """Check a journal and open it; a half line and a lock that a killed process has left are removed.

    Raises:
        BadRequestError: The journal is damaged, or cannot be read.
    """
    try:
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        data = path.read_bytes() if path.is_file() else b""
        if numbers := digested_lines.damaged(data):
            raise ValueError(f"line {numbers[0]} is not what was written")
        if not data.endswith(b"\n") and data:
            with path.open("rb+") as file:
                file.truncate(data.rfind(b"\n") + 1)
        return JournalStorage(DigestedJournal(str(path)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadRequestError(f"{path} is damaged or cannot be read ({reason})", JOURNAL_REMEDY) from None
