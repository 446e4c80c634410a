"""Tables of names: what another project calls a tensor, and what it is called here, in both directions.

Our own names are those of the CompVis implementations. A row of a table is a pair of name beginnings, theirs and ours,
in which `{side}` is `encoder` or `decoder`, `{i}` and `{j}` are numbers that both have, and `{r}` is a level that they
count from the coarsest and we from the finest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_FIELDS = {"side": r"(?P<side>encoder|decoder)", "i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "r": r"(?P<r>\d+)"}

_SAME = ("quantize", "quant_conv", "post_quant_conv", "{side}.conv_in", "{side}.conv_out")
"""Parts that have the same names in all projects."""


@dataclass(frozen=True)
class NameTable:
    """The names of one project.

    Attributes:
        parts: Names of the layers and blocks, theirs and ours; the first pair that fits counts.
        inside: Names inside a block, theirs and ours, of parts that have another name there.
    """

    parts: Sequence[tuple[str, str]]
    inside: Sequence[tuple[str, str]] = ()

    def to_ours(self, name: str, levels: int) -> str | None:
        """Return our name of a tensor; None if this project has no such tensor.

        Args:
            name: Their name.
            levels: Number of levels of the encoder and of the decoder.
        """
        return self._translate(name, levels, theirs=0)

    def to_theirs(self, name: str, levels: int) -> str | None:
        """Return their name of a tensor; None if their format has no place for it.

        Args:
            name: Our name.
            levels: Number of levels of the encoder and of the decoder.
        """
        return self._translate(name, levels, theirs=1)

    def _translate(self, name: str, levels: int, theirs: int) -> str | None:
        for pair in (*self.parts, *((part, part) for part in _SAME)):
            match = _pattern(pair[theirs]).match(name)
            if match is not None:
                fields = match.groupdict()
                if "r" in fields:
                    fields["r"] = str(levels - 1 - int(fields["r"]))
                return pair[1 - theirs].format(**fields) + self._translate_inside(name[match.end() :], theirs)
        return None

    def _translate_inside(self, rest: str, theirs: int) -> str:
        for pair in self.inside:
            if rest.startswith(f".{pair[theirs]}."):
                return f".{pair[1 - theirs]}{rest[len(pair[theirs]) + 1 :]}"
        return rest


def _pattern(template: str) -> re.Pattern[str]:
    """Return the pattern of a name beginning that ends before a dot, at the start of a name."""
    pieces = re.split(r"\{(\w+)\}", template)
    text = "".join(_FIELDS[piece] if index % 2 else re.escape(piece) for index, piece in enumerate(pieces))
    return re.compile(text + r"(?=\.)")


def count(names: Sequence[str], template: str) -> int:
    """Return how many numbers from 0 on the `{i}` of a name beginning takes: one more than the largest."""
    pattern = _pattern(template)
    matches = (pattern.match(name) for name in names)
    return max((int(match["i"]) + 1 for match in matches if match is not None), default=0)
