"""A small part of the campaign of `make campaign`: interruptions and damaged files, chosen anew by their seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaign.__main__ import cases, summary


@pytest.mark.slow
@pytest.mark.processes
def test_no_result_is_lost_unequal_or_silently_wrong(tmp_path: Path) -> None:
    tried = list(cases(tmp_path, seed=1, per_command=1, share=0.15))
    assert len(tried) > 40
    assert summary(tried, 1, 0)["problems"] == []
