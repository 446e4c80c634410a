"""Presets: YAML files that may inherit from a `base:` preset, and overrides of single settings.

Only the command line and `api` import this module; the modules below them receive typed settings.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from movq_cli import strict_yaml
from movq_cli.errors import BadRequestError, did_you_mean
from movq_cli.paths import expand_path
from movq_cli.setting_names import suggest
from movq_cli.settings import Preset
from movq_cli.text_encoding import TextEncodingError, decode_text

_PACKAGE = Path(__file__).resolve().parent

_MAX_BYTES = 2**20
"""Largest size of a preset file; all settings with their descriptions take 20 kB."""

_MAX_SHOWN = 200
"""Largest number of characters of a value in an error message."""


def folders() -> list[Path]:
    """Return the folders in which a preset is searched by name; the first one that has it wins.

    They are ./presets, the folder inside the package, and the folder of the source tree. The last one serves editable
    installs, in which the package does not contain the presets.
    """
    return [Path("presets"), _PACKAGE / "presets", _PACKAGE.parent / "presets"]


def available() -> dict[str, Path]:
    """Return the path of each preset that can be found by name."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def load(preset_name: str, overrides: Sequence[str] = ()) -> Preset:
    """Return the settings of a preset, with those that it inherits.

    Args:
        preset_name: Name of the preset, or path of a file that ends in `.yaml`.
        overrides: Dotted settings such as `vq.codebook_size=2048`; the values are parsed as YAML.

    Raises:
        BadRequestError: The preset or a setting is unknown, or a value is not allowed.
    """
    values = _read(preset_name)
    for override in overrides:
        _apply(values, override)
    _expand_paths(values)
    try:
        return Preset.model_validate(values)
    except ValidationError as error:
        raise BadRequestError(explain(error, f"preset {preset_name!r}")) from None


def require_known_setting(name: str, unused: Collection[str] = ()) -> None:
    """Refuse an unknown setting, with a hint at the one that is meant.

    Args:
        name: Dotted name of the setting.
        unused: Names of sections at whose settings the hint does not point.

    Raises:
        BadRequestError: There is no such setting.
    """
    known = [setting for setting, _ in settings_fields()]
    if name not in known:
        used = [setting for setting in known if setting.partition(".")[0] not in unused]
        raise BadRequestError(f"unknown setting {name!r}", suggest(name, used))


def settings_fields(model: type[BaseModel] = Preset, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name and the field of each setting; a section comes before its settings.

    Args:
        model: Class of the settings.
        prefix: Prefix of the names.
    """
    for name, field in model.model_fields.items():
        yield prefix + name, field
        section = section_class(field.annotation)
        if section is not None:
            yield from settings_fields(section, f"{prefix}{name}.")


def to_yaml(settings: Preset) -> str:
    """Return settings as YAML that can be loaded again, with the description of each setting as a comment."""
    descriptions = {name: field.description or "" for name, field in settings_fields()}
    lines: list[str] = []
    _write(settings.model_dump(mode="json"), "", descriptions, lines)
    return "\n".join(lines) + "\n"


def explain(error: ValidationError, owner: str) -> str:
    """Return the first violation as one line: the setting, what is wrong with its value, and similar names.

    Args:
        error: Error that pydantic raised.
        owner: Name of the thing that has the settings, with which the line begins.
    """
    violation = error.errors(include_url=False)[0]
    path = [part for part in violation["loc"] if isinstance(part, str)]
    dotted = ".".join(path)
    if violation["type"] == "extra_forbidden":
        siblings = [name for name, _ in settings_fields()]
        return f"{owner}: unknown setting {dotted!r}. {suggest(dotted, siblings)}"
    message = violation["msg"].removeprefix("Value error, ")
    given = "" if isinstance(violation["input"], dict | BaseModel) else f", not {_shortened(violation['input'])}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    form = _list_form(dotted, violation["input"]) if violation["type"] in {"tuple_type", "list_type"} else ""
    return f"{owner}: {f'{dotted}: ' if dotted else ''}{message}{given}{more}{form}"


def _list_form(setting: str, value: object) -> str:
    """Return how values are written as a list, as the end of a message; empty if the value is no number or text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    items = str(value).strip("()[]{} ").replace(";", ",")
    items = ",".join(items.replace(",", " ").split())
    return f". Write the list in brackets: '{setting}=[{items}]', or {setting.rpartition('.')[2]}: [{items}] in a file"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


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


def section_class(annotation: object) -> type[BaseModel] | None:
    """Return the class of settings in a field's annotation (`X` or `X | None`), or None if there is no such class."""
    choices = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def _find(name: str, child: Path | None) -> Path:
    """Return the path of the file of a preset.

    Args:
        name: Name of the preset, or path of its file.
        child: File of the preset that inherits from it, beside which it is searched first; None = there is none.

    Raises:
        BadRequestError: There is no such file.
    """
    if name.endswith((".yaml", ".yml")):
        path = expand_path(Path(name))
        places = [path] if child is None else [child.parent / path, path]
        for place in places:
            if place.is_file():
                return place
        named_by = "" if child is None else f" ({child} names it as its base)"
        raise BadRequestError(
            f"no preset file at {' or '.join(map(str, dict.fromkeys(places)))}{named_by}",
            "See `movq presets` for the names that exist.",
        )
    if child is not None:
        # A preset can have the name of its base: ./presets/digits.yaml changes settings of movq's own digits.
        found = [folder / f"{name}.yaml" for folder in (child.parent, *folders())]
        found = [path for path in found if path.is_file() and not path.samefile(child)]
        if found:
            return found[0]
    known = available()
    if name not in known:
        raise BadRequestError(f"unknown preset {name!r}", did_you_mean(name, known))
    return known[name]


def _read(name: str, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a preset and its bases; `children` are the files of the presets that inherit from it."""
    path = _find(name, children[-1] if children else None)
    if any(path.samefile(child) for child in children):
        raise BadRequestError(f"presets inherit in a circle: {' -> '.join(map(str, (*children, path)))}")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise BadRequestError(f"{path} is no preset: it has over {_MAX_BYTES} bytes", "Name a file of settings.")
        values = strict_yaml.parse(decode_text(data)) or {}
    except strict_yaml.AmbiguousYAMLError as error:
        raise BadRequestError(f"preset {path}: {error}") from None
    except TextEncodingError as error:
        raise BadRequestError(f"preset {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise BadRequestError(f"preset {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise BadRequestError(f"preset {path} must hold settings (name: value), not {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise BadRequestError(f"preset {path}: base must be one preset's name, not {base!r}")
    return _merge(_read(base, (*children, path)), values)


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
    require_known_setting(name)
    try:
        value = strict_yaml.parse(text)
    except strict_yaml.AmbiguousYAMLError as error:
        raise BadRequestError(f"setting {name}: {error}") from None
    except (yaml.YAMLError, ValueError):
        raise BadRequestError(f"setting {name}: the value {text!r} is not valid YAML") from None
    *sections, leaf = name.split(".")
    target = values
    for section in sections:
        if not isinstance(target.get(section), dict):
            target[section] = {}
        target = target[section]
    target[leaf] = value


def _expand_paths(values: dict[str, Any]) -> None:
    """Replace `~` and variables in the values of the settings that are paths."""
    for name, field in settings_fields():
        *sections, leaf = name.split(".")
        target: Any = values
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None
        if field.annotation is Path and isinstance(target, dict) and isinstance(target.get(leaf), str):
            target[leaf] = str(expand_path(Path(target[leaf])))
