"""`movq reconstruct --crop`: the central crops of images that have other shapes than the tokenizer's."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Movq


@pytest.mark.slow
def test_a_crop_is_reconstructed_as_an_image_that_was_cropped_before(movq: Movq, trained: Path) -> None:
    (trained / "wide").mkdir()
    for path in sorted((trained / "pictures").rglob("*.png"))[::10]:
        name = f"{path.parent.name}-{path.name}"
        picture = Image.open(path)  # 20 x 16 pixels
        picture.save(trained / "wide" / name)
        for side, covering in ((16, picture), (32, picture.resize((40, 32), Image.Resampling.LANCZOS))):
            (trained / f"square{side}").mkdir(exist_ok=True)
            left = (covering.width - side) // 2
            covering.crop((left, 0, left + side, side)).save(trained / f"square{side}" / name)
    for side in (16, 32):
        movq("reconstruct", "wide", f"cropped{side}", "--crop", side)
        movq("reconstruct", f"square{side}", f"expected{side}")
        expected = {path.name: path.read_bytes() for path in (trained / f"expected{side}").iterdir()}
        assert {path.name: path.read_bytes() for path in (trained / f"cropped{side}").iterdir()} == expected
        assert len(expected) == 6
    movq("reconstruct", "square16", "back", "--codes", "maps")
    refused = movq("reconstruct", "maps", "decoded", "--crop", 16, code=2)
    assert refused.stderr == "error: --crop has no effect: maps is a folder of code maps. Leave --crop out.\n"
    refused = movq("reconstruct", "wide", "filled", "--crop", 16, "--mask-ratio", 0.5, code=2)
    assert refused.stderr == "error: --crop has no effect with --mask-ratio or --mask. Leave --crop out.\n"
