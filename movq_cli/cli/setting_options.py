"""Options that are settings of a preset: the field of the setting gives their description, bounds and choices."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from movq_cli.errors import BadRequestError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from movq_cli.setting_types import Settings

Command = Callable[..., None]


def setting_option(model: type[Settings], name: str) -> Any:  # noqa: ANN401 - Typer's own type of an option
    """Return the Typer option of a setting, with the description, default, bounds and choices of its field.

    The option's own default must be None, which stands for the preset's value.

    Args:
        model: Class of the settings.
        name: Name of the field.
    """
    field = model.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    choices = setting_choices(field)

    def check(value: Any) -> Any:  # noqa: ANN401 - the value of any option
        return value if value is None else _check_value(model, field, flag, value)

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return typer.Option(
        f"{flag}/--no-{flag[2:]}" if setting_type(field) is bool else flag,
        help=_help_of(field),
        metavar="|".join(choices) or None,
        show_default=False,
        callback=check,
        autocompletion=complete if choices else None,
    )


def add_setting_options(
    model: type[Settings], *, before: str, elsewhere: dict[str, str] | None = None
) -> Callable[[Command], Command]:
    """Return a decorator that gives a command one option for each field of a class of settings.

    The command receives the values that the user gave, by name of the field, in its parameter `settings`.

    Args:
        model: Class of the settings.
        before: Name of the parameter before which the options are listed.
        elsewhere: Names of other parameters before which single options are listed, by name of the field.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            if name != "settings":
                fields = [field for field in model.model_fields if (elsewhere or {}).get(field, before) == name]
                parameters += [*(_parameter(model, field) for field in fields), parameter]

        @functools.wraps(command)
        def run(**options: Any) -> None:  # noqa: ANN401 - the command's own types
            values = {name: options.pop(name) for name in model.model_fields}
            command(**options, settings={name: value for name, value in values.items() if value is not None})

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def setting_type(field: FieldInfo) -> type:
    """Return the type of an option's value: that of the field without None; of choices it is str.

    Raises:
        TypeError: The field holds a section or several values, which an option cannot give.
    """
    kinds = {get_origin(part) or part for part in _unwrapped(field.annotation) if part is not types.NoneType}
    if kinds == {Literal} and all(isinstance(choice, str) for choice in setting_choices(field)):
        return str
    (kind,) = kinds if len(kinds) == 1 else (None,)
    if kind not in {bool, int, float, str, Path}:
        raise TypeError(f"a setting of type {field.annotation} cannot be an option")
    return kind


def setting_choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the values among which a setting is chosen; empty if it takes any value of its type."""
    parts = [part for part in _unwrapped(field.annotation) if get_origin(part) is Literal]
    return tuple(choice for part in parts for choice in get_args(part))


def setting_bounds(field: FieldInfo) -> str:
    """Return the bounds of a setting in words, such as "above 0 and at most 1"; empty if it has none."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{word} {_number_text(getattr(bound, name))}"
        for bound in (*field.metadata, *_bounds_within(field.annotation))
        for name, word in words.items()
        if hasattr(bound, name)
    ]
    return " and ".join(dict.fromkeys(found))


def setting_description(field: FieldInfo) -> tuple[str, str]:
    """Return a setting's description without its last part, and that part: the meaning of null, or an empty text."""
    description, _, meaning = (field.description or "").partition("; null = ")
    return description, meaning


def _number_text(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parameter(model: type[Settings], name: str) -> inspect.Parameter:
    annotation: Any = Annotated
    kind: Any = setting_type(model.model_fields[name])
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=annotation[kind | None, setting_option(model, name)],
    )


def _help_of(field: FieldInfo) -> str:
    description, null = setting_description(field)
    bounds = setting_bounds(field)
    default = (null or "null") if field.default is None else field.default
    default = _number_text(default) if isinstance(default, float) else default
    return (
        f"{description[:1].upper()}{description[1:]}{f' ({bounds})' if bounds else ''}. "
        f"[default: the preset's value, or {default}]"
    )


def _check_value(model: type[Settings], field: FieldInfo, flag: str, value: object) -> object:
    from pydantic import TypeAdapter, ValidationError

    from movq_cli.presets import explain

    annotation: Any = Annotated
    try:
        return TypeAdapter[object](annotation[field.annotation, field], config=model.model_config).validate_python(
            value
        )
    except ValidationError as error:
        raise BadRequestError(explain(error, flag)) from None


def _unwrapped(annotation: object) -> list[Any]:
    """Return the members of an annotation's union, each without the metadata of `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _unwrapped(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for member in get_args(annotation) for part in _unwrapped(member)]
    return [annotation]


def _bounds_within(annotation: object) -> list[Any]:
    """Return the bounds of the members of a union or of the elements of a tuple, as those of `Positive | None`."""
    if get_origin(annotation) is Annotated:
        return [bound for extra in get_args(annotation)[1:] for bound in getattr(extra, "metadata", (extra,))]
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return [bound for member in get_args(annotation) for bound in _bounds_within(member)]
    return []
