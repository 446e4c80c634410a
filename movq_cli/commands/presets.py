"""`movq presets`: which presets there are, and what one resolves to."""

from __future__ import annotations

from collections.abc import Sequence

from movq_cli import presets
from movq_cli.console import Console
from movq_cli.settings import Targets


def list_presets(console: Console) -> None:
    """Every preset with its description and the published figures that it is held against."""
    found = {name: presets.load(name) for name in presets.available()}
    data = {
        name: {"description": preset.description, "target": _figures(preset.target)} for name, preset in found.items()
    }
    rows = [
        (
            name,
            preset.description,
            ", ".join(f"{key} {value:g}" for key, value in _figures(preset.target).items()),
        )
        for name, preset in found.items()
    ]
    console.table(data, ["preset", "what it is", "published figures"], rows)


def show_preset(name: str, overrides: Sequence[str], console: Console) -> None:
    """One preset with everything inherited and overridden, as YAML that loads again."""
    preset = presets.load(name, overrides)
    console.result(preset.model_dump(mode="json"), presets.to_yaml(preset).rstrip("\n"))


def _figures(target: Targets) -> dict[str, float]:
    return target.model_dump(exclude={"source"}, exclude_none=True)
