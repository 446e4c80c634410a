"""`movq sample` records the order, the schedules and the interval of guidance, and resumes with these alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from movq_cli.errors import BadRequestError
from movq_cli.models import masked_prior
from tests.commands.test_sample import Draw, content, draw, manifest_of

__all__ = ["draw"]

OPTIONS = {
    "order": "halton",
    "mask_schedule": "arccos",
    "guidance": 2.0,
    "guidance_schedule": "power-cosine",
    "guidance_power": 2.0,
    "guidance_interval": "0.1-0.9",
}


def flags(**changes: object) -> list[str]:
    return [
        word for name, value in {**OPTIONS, **changes}.items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def test_samples_are_resumed_with_the_recorded_settings_alone(draw: Draw, tmp_path: Path) -> None:
    draw("complete", *flags())
    draw("out", *flags(), n=3)
    settings = manifest_of(tmp_path / "out")["settings"]
    assert {name: settings[name] for name in OPTIONS} == OPTIONS
    assert settings["revealed"] == masked_prior.revealed(256, 4, "arccos")
    others = {"order": "random", "mask_schedule": "square", "guidance_power": 3.0, "guidance_interval": "0.1-0.8"}
    for name, value in others.items():
        with pytest.raises(BadRequestError, match="samples of other"):
            draw("out", *flags(**{name: value}))
    assert draw("out", *flags())["made"] == 4
    assert content(tmp_path / "out") == content(tmp_path / "complete")
