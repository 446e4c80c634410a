"""Pages without the plotting library: tests that look at the HTML alone need no bundle, which takes seconds."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from movq_cli.report import library


@pytest.fixture
def short_library(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder in which the stored plotting library is one line."""
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed (pip install 'movq[report]')")
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    name = f"vega-lite-{library.VERSION}-{importlib.metadata.version('vl-convert-python')}.js"
    (cache / "movq").mkdir()
    (cache / "movq" / name).write_text(f"const vegaEmbed = () => 0;{library.END}")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An empty folder for runs."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"
