"""The tokenizer's settings: inconsistent ones are refused, and sizes follow from them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from movq_cli.settings import TokenizerSettings
from tests.models.layouts import KANDINSKY, MOVQ


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"multipliers": ()}, "multipliers is empty"),
        ({"channels": 48}, r"widths \[48, 48\].*multiple of norm_groups, 32"),
        ({"resolution": 250}, "resolution 250 is not a multiple of the downsampling factor 16"),
        ({"resolution": 8}, "resolution 8 is not a multiple"),
        ({"chunks": 3}, "embed_dim 256 does not divide into 3 chunks"),
        ({"chunks": 512}, "does not divide into 512 chunks"),
        ({"modulation": {"levels": 6}}, "levels is 6, but the decoder has 5 levels"),
        ({"embed_dim": 128}, "set embed_dim to 256"),
        ({"multipliers": (1, 1, 2, 2, 2)}, "set embed_dim to 128"),
        ({"modulation": None}, "'fourier' without modulation"),
        ({"modulation": None, "initial_feature": "sinusoid"}, "'sinusoid' without modulation"),
        ({"modulation": None, "initial_feature": "constant"}, "'constant' without modulation"),
        ({"modulation": None, "initial_feature": "projected"}, "'projected' without modulation"),
        ({"codebook_size": 1}, "codebook_size"),
        ({"codebook_size": 65_537}, "codebook_size"),
        ({"channels": 0}, "channels"),
        ({"blocks": 0}, "blocks"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"modulation": {"levels": -1}}, "levels"),
        ({"modulation": {"kernel_size": 5}}, "kernel_size"),
        ({"modulation": {"source": "image"}}, "source"),
        ({"initial_feature": "noise"}, "initial_feature"),
        ({"chanels": 128}, "chanels"),
        ({"modulation": {"level": 3}}, "level"),
    ],
)
def test_inconsistent_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenizerSettings.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"modulation": {"levels": 5}},
        {"modulation": {"levels": 0}},
        {"modulation": None, "initial_feature": "quantized"},
        {"embed_dim": 128, "initial_feature": "constant"},
        {"codebook_size": 65_536, "chunks": 256},
        {"codebook_size": 2, "resolution": 16},
    ],
)
def test_settings_at_the_edge_are_accepted(values: dict[str, Any]) -> None:
    TokenizerSettings.model_validate(values)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        MOVQ.channels = 64  # type: ignore[misc]  # pydantic has to refuse what the type checker refuses


def test_sizes_follow_from_the_settings() -> None:
    assert (MOVQ.factor, MOVQ.code_shape.height, MOVQ.code_dim, MOVQ.widths) == (16, 16, 64, (128, 128, 256, 256, 512))
    assert (KANDINSKY.factor, KANDINSKY.code_shape.height, KANDINSKY.code_dim) == (8, 32, 4)
    assert (MOVQ.code_shape.positions, MOVQ.code_shape.codes) == (256, 1024)
