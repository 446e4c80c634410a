"""The file by which an output folder inside a source is recognized, so that it is not read as a part of it."""

from __future__ import annotations

import json
from pathlib import Path

OUTPUT_MARK = ".movq-output.json"
"""File in an output folder that lies inside the folder of its source."""

_MAX_BYTES = 2**16


def is_output_inside(folder: Path, root: Path) -> bool:
    """Return whether a folder is the output of a command that read the images of another folder, or of a part of it.

    A folder whose mark is damaged counts as such an output.

    Args:
        folder: Folder below `root`.
        root: Folder that is listed, as a resolved path.
    """
    try:
        with (folder / OUTPUT_MARK).open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError:
        return False
    try:
        return (folder / json.loads(data)["source"]).resolve().is_relative_to(root)
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return True
