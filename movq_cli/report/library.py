"""The plotting library of the page, Vega-Lite, as one piece of JavaScript.

`vl-convert-python` bundles it. That takes seconds and a JavaScript engine, so that a process of its own does it once,
and the result is stored in the cache folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import atomic_write, cache_folder

VERSION = "6.1"
"""Version of Vega-Lite."""

_SECONDS = 300
"""Time after which the bundling has failed, seconds."""

_BUNDLE = f"""
import sys, vl_convert
text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version="{VERSION}")
sys.stdout.buffer.write(text.encode())
"""

_memory: dict[Path, str] = {}


def is_installed() -> bool:
    """Return whether a report can be made here."""
    return importlib.util.find_spec("vl_convert") is not None and importlib.util.find_spec("jinja2") is not None


def javascript() -> str:
    """Return the library, some 900 kB of JavaScript that defines `vegaEmbed`.

    Raises:
        BadRequestError: It is not installed.
        FailureError: It cannot be bundled.
    """
    if not is_installed():
        raise BadRequestError(
            "a report needs vl-convert-python and Jinja2", "Install them: pip install 'movq[report]'."
        )
    version = importlib.metadata.version("vl-convert-python")
    path = cache_folder() / f"vega-lite-{VERSION}-{version}.js"
    if path not in _memory:
        _memory[path] = _read(path) or _bundle(path)
    return _memory[path]


def _read(path: Path) -> str | None:
    """Return the stored library; None if it is not stored completely."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if text.endswith(END) else None


END = "\n/* end of the bundle */\n"
"""Last line of a stored bundle, by which one that is cut off is recognized."""


def _bundle(path: Path) -> str:
    try:
        done = subprocess.run([sys.executable, "-c", _BUNDLE], capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise FailureError(f"the plotting library was not bundled within {_SECONDS} seconds", "Try again.") from None
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise FailureError(
            f"vl-convert-python cannot bundle the plotting library ({reason})",
            "Install it again: pip install --force-reinstall vl-convert-python",
        )
    # Inside a page, these characters would end the script.
    text = done.stdout.decode().replace("</script", "<\\/script").replace("<!--", "<\\!--") + END
    with suppress(OSError, FailureError):  # Without the cache, the next process bundles it again.
        atomic_write(path, text.encode())
    return text
