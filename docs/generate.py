"""Generates the reference, docs/cli.md and docs/settings.md, from the commands and the settings themselves.

`python docs/generate.py` writes both files; with --check it only says whether they are up to date.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from movq_cli.app import app
from movq_cli.cli.setting_options import setting_bounds, setting_description
from movq_cli.presets import section_class, settings_fields
from movq_cli.settings import Preset

FOLDER = Path(__file__).parent

_NOTICE = "<!-- This file is generated. Do not edit it: change the source, and run `make docs`. -->"
_DEFAULT = re.compile(r"\s*\[default: ([^\]]*)\]$")
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", type(None): "null"}


def cli_reference() -> str:
    """Return the reference of the command line as Markdown."""
    lines = [_NOTICE, "", "# Commands and their options", ""]
    root = typer.main.get_command(app)
    lines += ["Options of `movq` itself:", "", *_option_table(root.params, {})]
    lines += [line for name, command, function in _commands(app, "movq") for line in _section(name, command, function)]
    return "\n".join(lines).rstrip() + "\n"


def settings_reference() -> str:
    """Return the reference of the settings as Markdown."""
    lines = [_NOTICE, "", "# Settings", ""]
    lines += [
        "A preset (`presets/*.yaml`) gives values to these settings, and `-o NAME=VALUE` overrides one of them.",
        "",
    ]
    groups: dict[str, list[tuple[str, FieldInfo]]] = {}
    for name, field in settings_fields():
        section = name.partition(".")[0]
        is_section = section_class(Preset.model_fields[section].annotation) is not None
        groups.setdefault(section if is_section else "", []).append((name, field))
    for section, members in groups.items():
        if section:
            model = section_class(Preset.model_fields[section].annotation)
            lines += [f"## {section}", "", " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split()), ""]
        rows = [
            (f"`{name}`", _type_text(field.annotation), _setting_default(field), setting_bounds(field), _phrase(field))
            for name, field in members
            if name != section
        ]
        lines += [*_table(("setting", "type", "default", "bounds", "description"), rows), ""]
    return "\n".join(lines).rstrip() + "\n"


REFERENCES = {"cli.md": cli_reference, "settings.md": settings_reference}


def main(arguments: Sequence[str]) -> int:
    """Write the reference or, with --check, compare it with the files.

    Returns:
        The exit code: 1 if a file is not up to date.
    """
    texts = {FOLDER / name: write() for name, write in REFERENCES.items()}
    if "--check" not in arguments:
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if stale:
        sys.stderr.write(
            f"error: not up to date: {', '.join(f'docs/{path.name}' for path in stale)}; run `make docs`\n"
        )
    return 1 if stale else 0


def _commands(group: typer.Typer, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield each command below a group: its full name, the command that Typer made, and its Python function."""
    made: Any = typer.main.get_command(group)
    for info in group.registered_commands:
        yield f"{prefix} {info.name}", made.commands[info.name], info.callback
    for child in group.registered_groups:
        child_app, name = child.typer_instance, child.name
        assert child_app is not None
        assert child_app.registered_callback is not None
        yield f"{prefix} {name}", made.commands[name], child_app.registered_callback.callback
        yield from _commands(child_app, f"{prefix} {name}")


def _section(name: str, command: Any, function: Any) -> list[str]:  # noqa: ANN401 - a command of Typer
    annotations = {
        key: value.annotation for key, value in inspect.signature(function, eval_str=True).parameters.items()
    }
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join(f"[{part.metavar}]" if not part.required else part.metavar for part in arguments)
    lines = ["", f"## {name}", "", " ".join((inspect.getdoc(function) or "").split()), ""]
    lines += [f"    {name} [OPTIONS] {usage}".rstrip(), ""]
    if arguments:
        rows = [(f"`{part.metavar}`", *_default_and_help(part)) for part in arguments]
        lines += [*_table(("argument", "default", "description"), rows), ""]
    return lines + _option_table(options, annotations)


def _option_table(options: Sequence[Any], annotations: dict[str, Any]) -> list[str]:
    rows = [
        (
            ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts)),
            _option_type(option, annotations.get(option.name)),
            *_default_and_help(option),
        )
        for option in options
        if option.name != "help"
    ]
    return _table(("option", "type", "default", "description"), rows)


def _option_type(option: Any, annotation: Any) -> str:  # noqa: ANN401 - an option of Typer
    if annotation is None or getattr(option, "is_flag", False):
        return "flag"
    if option.metavar:
        return f"`{option.metavar}`"
    (info,) = (extra for extra in get_args(annotation)[1:] if isinstance(extra, typer.models.OptionInfo))
    bounds = [f"at least {info.min}"] if info.min is not None else []
    bounds += [f"at most {info.max}"] if info.max is not None else []
    text = _type_text(get_args(annotation)[0], with_null=False)
    return f"{text}, {' and '.join(bounds)}" if bounds else text


def _default_and_help(parameter: Any) -> tuple[str, str]:  # noqa: ANN401 - a parameter of Typer
    text = " ".join((parameter.help or "").split())
    if parameter.required:
        return "required", text
    given = _DEFAULT.search(text)
    if given is not None and text.count("[default:") == 1:
        return given[1], text[: given.start()]
    flag = isinstance(parameter.default, bool)
    if flag:
        return ("on" if parameter.default else "off"), text
    return ("" if parameter.default is None or callable(parameter.default) else f"`{parameter.default}`"), text


def _setting_default(field: FieldInfo) -> str:
    if section_class(field.annotation) is not None:
        return "the section's defaults"
    _, null = setting_description(field)
    if field.default is None:
        return f"null: {null}" if null else "null"
    if field.default == "":
        return "empty"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _phrase(field: FieldInfo) -> str:
    description, null = setting_description(field)
    return description if field.default is None or not null else f"{description}; null = {null}"


def _type_text(annotation: Any, *, with_null: bool = True) -> str:  # noqa: ANN401 - an annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0], with_null=with_null)
    if origin in (Union, types.UnionType):
        parts = [_type_text(part) for part in arguments if with_null or part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (tuple, list):
        number = f"{len(arguments)} x " if origin is tuple and arguments[-1] is not ... else ""
        return f"list of {number}{_type_text(arguments[0])}"
    return "section" if issubclass(annotation, BaseModel) else _TYPES[annotation]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return [f"| {' | '.join(row)} |" for row in escaped]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
