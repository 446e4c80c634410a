"""The preset from which a new one inherits: for squares by the side, for equal rectangles by the area."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from movq_cli import presets
from movq_cli.commands.new_preset import NewPresetRequest, new_preset
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.commands.preset_base import base_for
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.image_size import Resolution
from movq_cli.training import pace
from tests.conftest import TINY

QUIET = Console(quiet=True)


def prepared_at(shapes: Path, size: Resolution, out: Path) -> PreparedSet:
    prepare(PrepareRequest(str(shapes), out, Preprocessing(size, False, True), val="0.2", workers=0), QUIET)
    return PreparedSet.open(out)


@pytest.mark.parametrize(
    ("size", "base", "rectangle"),
    [
        (64, "photos-64", None),
        (100, "photos-64", None),
        ((192, 256), "photos-256", (192, 256)),
        ((64, 48), "photos-64", (64, 48)),
        ((96, 160), "photos-128", (96, 160)),
        ((66, 90), "photos-64", None),  # No preset's codes can cover it.
    ],
)
def test_the_base_suits_the_size_of_the_images(
    shapes: Path, tmp_path: Path, size: Resolution, base: str, rectangle: tuple[int, int] | None
) -> None:
    images = prepared_at(shapes, size, tmp_path / "set")
    assert base_for(images, tmp_path / "set") == (base, rectangle)


@pytest.mark.slow
def test_the_preset_of_a_set_of_rectangles_has_their_size(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pace, "_SECONDS", 0.1)
    Path("presets").mkdir()
    Path("presets/photos-16.yaml").write_text(json.dumps(TINY))
    prepared_at(shapes, (12, 20), Path("data"))
    new_preset(NewPresetRequest(Path("wide.yaml"), Path("data"), hours=0.05, device_name="cpu"), QUIET)
    settings = presets.load("wide.yaml").vq
    assert settings.image_size == (12, 20)
    assert settings.attention_levels == presets.load("photos-16").vq.attention_levels
