"""The parts of a page as plain data: charts, films of pictures, galleries, tables. The template draws each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Block:
    """A part of a page."""

    kind: ClassVar[str]
    """Name by which the template selects how the part is drawn."""
    title: str
    note: str
    """Sentences about the content: for a chart, its meaning and its shape if the training is healthy."""


@dataclass(frozen=True)
class Chart(Block):
    """A chart of the plotting library."""

    kind = "chart"
    spec: Mapping[str, Any]
    """Vega-Lite specification without data."""
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]
    """For each line its name, its values along x, and its values along y."""
    events: Sequence[tuple[float, str]] = ()
    """Marked values along x, and what happened there."""


@dataclass(frozen=True)
class Row:
    """A row of pictures in a film; each frame is a strip of pictures side by side."""

    label: str
    frames: Sequence[str]
    """Data URI of each step; a single one stays the same at every step."""


@dataclass(frozen=True)
class Film(Block):
    """Rows of pictures that a slider moves through the steps of a training."""

    kind = "film"
    unit: str
    """Unit of the positions of the slider, such as "step"."""
    steps: Sequence[int]
    rows: Sequence[Row]
    columns: Sequence[str]
    """Headings of the columns; empty texts where there are none."""
    width: int
    """Width of a strip in pixels, before zoom."""
    zoom: int
    """Factor of the zoom at first."""


@dataclass(frozen=True)
class Picture:
    """A picture with its caption."""

    uri: str
    caption: str
    width: int
    """Displayed width, pixels."""


@dataclass(frozen=True)
class Gallery(Block):
    """Pictures side by side."""

    kind = "gallery"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Table(Block):
    """A table of texts."""

    kind = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_folded: bool = False
    """Whether the table is hidden until somebody opens it."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run."""

    run: str
    title: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Findings(Block):
    """The diagnosis of the runs."""

    kind = "findings"
    findings: Sequence[Finding]
    checked: int
    """Number of rules that were applied."""


@dataclass(frozen=True)
class Text(Block):
    """A sentence in place of a part that cannot be shown."""

    kind = "text"


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    id: str
    title: str
    blocks: Sequence[Block] = field(default=())
