"""Presets: YAML with one `base:` parent, dotted overrides, and errors that name the near setting.

Only the edge (the command line and the Python face) imports this: everything below gets typed values.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from movq_cli.errors import BadRequestError, did_you_mean
from movq_cli.settings import Preset

_PACKAGE = Path(__file__).resolve().parent


def folders() -> list[Path]:
    """Where a preset's name is looked up, first hit wins: ./presets, the package's, the source tree's.

    An editable install does not see the files that the wheel carries inside the package, hence the last.
    """
    return [Path("presets"), _PACKAGE / "presets", _PACKAGE.parent / "presets"]


def available() -> dict[str, Path]:
    """Every preset that a name finds, by name."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def load(name: str, overrides: Sequence[str] = ()) -> Preset:
    """Resolve a preset.

    Args:
        name: A preset's name, or the path of a file ending in `.yaml`.
        overrides: Dotted settings such as `vq.codebook_size=2048`; values are read as YAML.

    Raises:
        BadRequestError: An unknown preset or setting, or a value that does not fit.
    """
    values = _read(name, seen=())
    for override in overrides:
        _apply(values, override)
    try:
        return Preset.model_validate(values)
    except ValidationError as error:
        raise BadRequestError(explain(error, f"preset {name!r}")) from None


def settings_fields(model: type[BaseModel] = Preset, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its dotted name, sections before what they hold."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        section = _section(field.annotation)
        if section is not None:
            yield from settings_fields(section, f"{prefix}{name}.")


def to_yaml(preset: Preset) -> str:
    """A resolved preset as YAML that loads again, each setting with its description as a comment."""
    descriptions = {name: field.description or "" for name, field in settings_fields()}
    lines: list[str] = []
    _write(preset.model_dump(mode="json"), "", descriptions, lines)
    return "\n".join(lines) + "\n"


def explain(error: ValidationError, where: str) -> str:
    """The first fault as one line: which setting, what is wrong with it, which name is near.

    Args:
        error: What pydantic found.
        where: What holds the settings, to begin the line with.
    """
    fault = error.errors(include_url=False)[0]
    path = [part for part in fault["loc"] if isinstance(part, str)]
    dotted = ".".join(path)
    if fault["type"] == "extra_forbidden":
        siblings = [name for name, _ in settings_fields()]
        return f"{where}: unknown setting {dotted!r}. {did_you_mean(dotted, siblings)}"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if isinstance(fault["input"], dict | BaseModel) else f", not {fault['input']!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {f'{dotted}: ' if dotted else ''}{message}{given}{more}"


def _write(values: dict[str, Any], prefix: str, descriptions: dict[str, str], lines: list[str]) -> None:
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        comment = f"  # {descriptions[prefix + key]}"
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:{comment}")
            _write(value, f"{prefix}{key}.", descriptions, lines)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
            lines.append(f"{indent}{key}: {text}{comment}")


def _section(annotation: object) -> type[BaseModel] | None:
    """The settings class inside a field's annotation, if it holds one (`X` or `X | None`)."""
    choices = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise BadRequestError(f"no preset file at {name}", "See `movq presets` for the names that exist.")
        return path
    known = available()
    if name not in known:
        raise BadRequestError(f"unknown preset {name!r}", did_you_mean(name, known))
    return known[name]


def _read(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        raise BadRequestError(f"presets inherit in a circle: {' -> '.join((*seen, name))}")
    path = _find(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadRequestError(f"preset {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise BadRequestError(f"preset {path} must hold settings (name: value), not {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise BadRequestError(f"preset {path}: base must be one preset's name, not {base!r}")
    return _merge(_read(base, (*seen, name)), values)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        both_sections = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_sections else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise BadRequestError(
            f"setting {override!r} is not of the form name=value", "Example: -o vq.codebook_size=2048"
        )
    known = [setting for setting, _ in settings_fields()]
    if name not in known:
        raise BadRequestError(f"unknown setting {name!r}", did_you_mean(name, known))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise BadRequestError(f"setting {name}: the value {text!r} is not valid YAML") from None
    *sections, leaf = name.split(".")
    place = values
    for section in sections:
        if not isinstance(place.get(section), dict):
            place[section] = {}
        place = place[section]
    place[leaf] = value
