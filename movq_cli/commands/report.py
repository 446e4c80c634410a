"""`movq report`: one HTML page about a run, or one that compares several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from movq_cli.console import Console
from movq_cli.data.output_files import PAGE, refuse_foreign
from movq_cli.report import page
from movq_cli.run_history import RunHistory


def report(folders: Sequence[Path], out: Path, *, with_models: bool, device_name: str | None, console: Console) -> None:
    """Write the page of one run, or of several.

    Args:
        folders: Run folders, at least one.
        out: File of the page.
        with_models: Whether the parts that need the weights are drawn.
        device_name: Name of the device of the models; None uses CUDA if it is available.
        console: Console for the progress and the result.

    Raises:
        BadRequestError: A folder is not a run folder, `out` is a file that movq did not write, or the plotting library
            is not installed.
        FailureError: The page cannot be written.
    """
    began = time.perf_counter()
    refuse_foreign(out, PAGE)
    histories = [RunHistory.read(folder) for folder in folders]
    for history in histories:
        if history.damage is not None:
            console.warn(history.damage)
    device = None
    if with_models and len(histories) == 1:
        from movq_cli import devices

        device = devices.select(device_name)
    page.write(out, histories, device)
    size = out.stat().st_size
    console.log(f"{size / 1e6:.1f} MB in {time.perf_counter() - began:.1f} s")
    console.result({"path": str(out), "runs": [str(folder) for folder in folders], "bytes": size}, str(out))
