"""The commands of movq as processes, and the logs of the trainings that they ran."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any


def read_log(log: Path, batch_size: int) -> tuple[list[dict[str, Any]], float]:
    """Return the validations of a run with their evaluations, and the seconds that its steps took.

    A killed run repeats the steps since its last checkpoint: the line that it wrote last counts.
    """
    training: dict[int, float] = {}
    validations: dict[int, dict[str, Any]] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if "validation" in record:
            known = validations.get(record["step"], {"step": record["step"]})
            validations[record["step"]] = {**known, **record["validation"]}
        elif "images_per_second" in record:  # The other lines are those of the start of a session.
            training[record["step"]] = record["images_per_second"]
    steps = sorted(training)
    seconds = sum(
        (step - before) * batch_size / training[step] for before, step in zip([0, *steps], steps, strict=False)
    )
    return [validations[step] for step in sorted(validations)], seconds


def movq(*arguments: str | Path) -> Any:  # noqa: ANN401 - each command has its own result
    """Run a command in its own process, and return its result; if it fails, exit with its exit code.

    Ctrl-C and SIGTERM are forwarded once: the command writes a checkpoint and ends.
    """
    command = [sys.executable, "-m", "movq_cli", *map(str, arguments), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def hand_on(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result, _ = process.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(result)
