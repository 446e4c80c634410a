"""The wheel contains the presets and the marker of type annotations, and finds the presets from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_works_away_from_the_source_tree(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("movq-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert "movq_cli/py.typed" in names
    assert {f"movq_cli/presets/{path.name}" for path in (ROOT / "presets").glob("*.yaml")} <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shown = subprocess.run(
        [sys.executable, "-m", "movq_cli", "presets", "show", "ffhq"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "resolution: 256" in shown.stdout
    location = subprocess.run(
        [sys.executable, "-c", "import movq_cli; print(movq_cli.__file__)"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert location.stdout.startswith(str(tmp_path / "site"))


def test_an_editable_install_finds_its_presets_from_any_folder(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "movq_cli", "presets", "show", "digits"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "resolution: 32" in shown.stdout
