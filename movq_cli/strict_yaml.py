"""YAML with one meaning: what people read differently from YAML 1.1 is refused instead of guessed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

_MAX_VALUES = 10_000
"""Largest number of values in a text. A few aliases of aliases can stand for 10^9 values."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

_OCTAL = re.compile(r"[-+]?0[0-9_]+")
"""Integers such as 010, which YAML 1.1 reads as octal."""


class AmbiguousYAMLError(ValueError):
    """A YAML text has a repeated key, or a number that people read differently; the message names the lines."""


def parse(text: str) -> Any:  # noqa: ANN401 - YAML can be any value
    """Return the value of a YAML text.

    Raises:
        AmbiguousYAMLError: A key is given twice, or a number such as 1:30 or 010 would become another number.
        yaml.YAMLError: It is not valid YAML.
        ValueError: It contains an impossible number or date, is nested too deeply, or is larger than a file of settings
            because of its aliases.
    """
    with _limited_depth():
        for name, node in _scalars_and_keys(_compose(text), "", set()):
            _check_number(name, node)
        return yaml.safe_load(text)


def load_plain(text: str) -> Any:  # noqa: ANN401 - YAML can be any value
    """Return the value of a YAML text of another project, which may have repeated keys and any numbers.

    Raises:
        yaml.YAMLError: It is not valid YAML.
        ValueError: It cannot be read, as for `parse`.
    """
    with _limited_depth():
        _compose(text)
        return yaml.safe_load(text)


@contextmanager
def _limited_depth() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise ValueError("it is nested too deeply, or in itself") from None


def _compose(text: str) -> yaml.Node | None:
    """Return the nodes of a text, in which aliases are not expanded.

    Raises:
        ValueError: Its aliases stand for too many values.
    """
    root: yaml.Node | None = yaml.compose(text, yaml.SafeLoader)
    if _expanded_size(root, {}) > _MAX_VALUES:
        raise ValueError(f"its aliases stand for more than {_MAX_VALUES} values")
    return root


def _scalars_and_keys(node: yaml.Node | None, name: str, visited: set[int]) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Yield the dotted name and the node of each scalar value, and refuse repeated keys on the way.

    Args:
        node: The node; None for an empty text.
        name: Dotted name of the node.
        visited: Identities of the nodes that are read already, because an alias is the same node again.

    Raises:
        AmbiguousYAMLError: A key is given twice.
    """
    if node is None or id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield name, node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars_and_keys(item, name, visited)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, yaml.Node] = {}
        for key, value in node.value:
            own = f"{name}.{key.value}".lstrip(".") if isinstance(key, yaml.ScalarNode) else name
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, key) is not key:
                lines = sorted({_line(first[key.value]), _line(key)})
                place = f"lines {lines[0]} and {lines[1]}" if len(lines) == 2 else f"line {lines[0]}"
                raise AmbiguousYAMLError(f"{own} is given twice, in {place}. Write it once, with all of its values.")
            yield from _scalars_and_keys(value, own, visited)


def _check_number(name: str, node: yaml.ScalarNode) -> None:
    """Refuse an integer in octal or a number in base 60.

    Raises:
        AmbiguousYAMLError: The node is such a number.
    """
    text = str(node.value)
    if node.tag not in _NUMBERS or not (":" in text or _OCTAL.fullmatch(text)):
        return
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    kind = "in base 60" if ":" in text else "in octal"
    example = "a plain number, such as 90" if ":" in text else f"it without the leading zero ({_plain(shown)})"
    place = f"{name}, line {_line(node)}: " if name else ""
    raise AmbiguousYAMLError(
        f"{place}{shown} would be a number {kind}. Write {example}, or '{shown}' in quotes for a text."
    )


def _plain(text: str) -> str:
    """Return the text of an integer without its leading zeros."""
    sign = text[0] if text[0] in "+-" else ""
    return sign + (text.lstrip("+-0_") or "0")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _expanded_size(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Return the number of values of a YAML node, with those of an alias at each of its places.

    Args:
        node: The node; None for an empty text.
        sizes: Sizes of the nodes that are known already, by their identity.

    Raises:
        RecursionError: The node contains itself.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        sizes[id(node)] = 1 + sum(_expanded_size(part, sizes) for part in parts)
    return sizes[id(node)]
