"""`movq presets`: lists the presets, and shows the settings of one."""

from __future__ import annotations

from collections.abc import Sequence

from movq_cli import presets
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.settings import Preset, Targets


def list_presets(console: Console) -> None:
    """Print each preset with its description and the published values that it should reproduce."""
    found: dict[str, Preset] = {}
    for name, path in presets.available().items():
        try:
            found[name] = presets.load(name)
        except (BadRequestError, OSError) as error:
            console.warn(f"{path} is passed over: {error}")
    data = {
        name: {"description": settings.description, "target": _published(settings.target)}
        for name, settings in found.items()
    }
    rows = [
        (
            name,
            settings.description,
            ", ".join(f"{metric} {value:g}" for metric, value in _published(settings.target).items()),
        )
        for name, settings in found.items()
    ]
    console.table(data, ["preset", "description", "published values"], rows)


def show_preset(preset_name: str, overrides: Sequence[str], console: Console) -> None:
    """Print all settings of one preset, with those that it inherits, as YAML that can be loaded again.

    Args:
        preset_name: Name of the preset, or path of a .yaml file.
        overrides: Dotted settings such as `vq.codebook_size=2048`.
        console: Console for the result.
    """
    settings = presets.load(preset_name, overrides)
    console.result(settings.model_dump(mode="json"), presets.to_yaml(settings).rstrip("\n"))


def _published(target: Targets) -> dict[str, float]:
    """Return all published values, those of samples with the mode of their prior in front."""
    samples = {f"{mode} {name}": value for mode in ("mask", "auto") for name, value in target.of_samples(mode).items()}
    return target.of_reconstructions() | samples
