"""The benchmark of the plan: movq accepts the training of each of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import planning
from movq_cli.app import app


@pytest.mark.parametrize("name", planning.ROWS)
def test_the_training_of_a_row_is_accepted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    arguments = planning.training(name, 4, tmp_path)
    if "--tokenizer" in arguments:  # The run does not exist before the benchmark has trained it.
        index = arguments.index("--tokenizer")
        del arguments[index : index + 2]
    app([*arguments, "--dry-run"], standalone_mode=False)
    assert "memory_gib" in capsys.readouterr().out
