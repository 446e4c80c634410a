"""Vega-Lite specifications of the charts. Colors are CSS variables, so that a chart follows the page into the dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from movq_cli.report.blocks import Chart
from movq_cli.run_history import Series

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#06b6d4", "#ec4899", "#84cc16")
"""Colors of the lines, which are legible on light and on dark pages."""

_MOST_POINTS = 400
"""Largest number of points of a line; longer ones are means of equally many neighbours."""

_INK, _FAINT = "var(--ink)", "var(--rule)"

_CONFIG: Mapping[str, Any] = {
    "background": "transparent",
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _INK,
        "titleColor": _INK,
        "gridColor": _FAINT,
        "domainColor": _FAINT,
        "tickColor": _FAINT,
        "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": _INK,
        "title": None,
        "orient": "top",
        "direction": "horizontal",
        "columns": 2,
        "columnPadding": 24,
        "labelLimit": 260,
        "symbolType": "stroke",
    },
    "range": {"category": list(COLORS)},
}

_FRAME: Mapping[str, Any] = {
    "width": "container",
    "height": 210,
    "autosize": {"type": "fit-x", "contains": "padding"},
    "config": _CONFIG,
    "data": {"name": "rows"},
}
"""Entries that the specification of each chart has."""


def of_series(
    title: str,
    note: str,
    series: Mapping[str, Series],
    *,
    events: Sequence[tuple[float, str]] = (),
    unit: str = "",
    is_log: bool = False,
) -> Chart | None:
    """Return a chart of metrics by step; None if there is nothing to draw.

    Args:
        title: Title of the chart.
        note: What it shows, and what it looks like if the training is healthy.
        series: Metrics by the name of their line.
        events: Marked steps, and what happened there.
        unit: Title of the vertical axis.
        is_log: Whether the vertical axis is logarithmic, if all values are positive.
    """
    drawn = {name: values for name, values in series.items() if len(values)}
    if not drawn:
        return None
    lines = [(name, *_thinned(values)) for name, values in drawn.items()]
    values = [value for _, _, line in lines for value in line]
    is_log = is_log and min(values) > 0 and max(values) > 5 * min(values)
    y: dict[str, Any] = {"field": "y", "type": "quantitative", "title": unit or None}
    y["scale"] = {"type": "log"} if is_log else {"zero": False, "nice": True}
    x: dict[str, Any] = {
        "field": "x",
        "type": "quantitative",
        "title": "step",
        "axis": {"format": "~s", "tickCount": 8},
    }
    x["scale"] = {"nice": False}
    spec = _line_spec(x, y, list(drawn), has_single_points=any(len(line) == 1 for _, line, _ in lines))
    if not events:
        spec["layer"] = [layer for layer in spec["layer"] if "data" not in layer]
    return Chart(title, note, spec, lines, events)


def _line_spec(
    x: dict[str, Any], y: dict[str, Any], names: Sequence[str], *, has_single_points: bool
) -> dict[str, Any]:
    color: dict[str, Any] = {"field": "name", "type": "nominal", "sort": list(names), "scale": {"domain": list(names)}}
    if len(names) == 1:
        color["legend"] = None
    hover = {"name": "hover", "select": {"type": "point", "nearest": True, "on": "pointermove", "clear": "pointerout"}}
    tooltip = [
        {"field": "name", "type": "nominal", "title": "line"},
        {"field": "x", "type": "quantitative", "title": "step", "format": ",d"},
        {"field": "y", "type": "quantitative", "title": "value", "format": ".5~g"},
    ]
    shown = {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 1 if has_single_points else 0}
    return {
        **_FRAME,
        "layer": [
            {
                "data": {"name": "events"},
                "mark": {"type": "rule", "strokeDash": [4, 3], "color": _INK, "opacity": 0.6},
                "encoding": {"x": {"field": "x", "type": "quantitative"}, "tooltip": {"field": "label"}},
            },
            {
                "data": {"name": "events"},
                "mark": {"type": "text", "angle": 270, "align": "right", "baseline": "bottom", "dx": -4, "dy": -3}
                | {"fontSize": 10, "color": _INK, "opacity": 0.75},
                "encoding": {
                    "x": {"field": "x", "type": "quantitative"},
                    "y": {"value": 0},
                    "text": {"field": "label", "type": "nominal"},
                },
            },
            {
                "mark": {"type": "line", "strokeWidth": 1.8, "clip": True},
                "params": [
                    {
                        "name": "window",
                        "bind": "scales",
                        "select": {"type": "interval", "encodings": ["x"], "zoom": "wheel![event.shiftKey]"},
                    }
                ],
                "encoding": {"x": x, "y": y, "color": color},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 55, "clip": True},
                "params": [hover],
                "encoding": {"x": x, "y": y, "color": color, "opacity": shown, "tooltip": tooltip},
            },
        ],
    }


def of_bars(title: str, note: str, values: Iterable[float], *, x_title: str, y_title: str) -> Chart:
    """Return a chart of values by their index, as an area with steps.

    Args:
        title: Title of the chart.
        note: What it shows, and what it looks like if the training is healthy.
        values: Height of each bar.
        x_title: Title of the horizontal axis.
        y_title: Title of the vertical axis.
    """
    listed = [float(value) for value in values]
    spec = {
        **_FRAME,
        "mark": {"type": "area", "interpolate": "step-after", "color": COLORS[0], "opacity": 0.85, "tooltip": True},
        "encoding": {
            "x": {"field": "x", "type": "quantitative", "title": x_title, "scale": {"nice": False}},
            "y": {"field": "y", "type": "quantitative", "title": y_title},
        },
    }
    return Chart(title, note, spec, [("", [*range(len(listed) + 1)], [*listed, listed[-1] if listed else 0.0])])


def of_groups(
    title: str, note: str, groups: Mapping[str, Sequence[float]], labels: Sequence[str], *, y_title: str
) -> Chart:
    """Return a chart of values by label, with one line and its points for each group.

    Args:
        title: Title of the chart.
        note: What it shows, and what it looks like if the training is healthy.
        groups: Values of each group, one for each label.
        labels: Labels along the horizontal axis.
        y_title: Title of the vertical axis.
    """
    names = list(groups)
    index = {
        "field": "x",
        "type": "quantitative",
        "title": None,
        "scale": {"domain": [-0.3, len(labels) - 0.7], "nice": False},
        "axis": {"values": [*range(len(labels))], "labelExpr": f"{list(labels)!r}[datum.value]", "grid": False},
    }
    color: dict[str, Any] = {"field": "name", "type": "nominal", "sort": names, "scale": {"domain": names}}
    spec = {
        **_FRAME,
        "mark": {"type": "line", "point": {"filled": True, "size": 55}, "strokeWidth": 1.8, "tooltip": True},
        "encoding": {
            "x": index,
            "y": {"field": "y", "type": "quantitative", "title": y_title, "scale": {"zero": False}},
            "color": color,
        },
    }
    return Chart(title, note, spec, [(name, [*range(len(values))], list(values)) for name, values in groups.items()])


def _thinned(series: Series) -> tuple[list[float], list[float]]:
    """Return the steps and values of a series; of a long one, the means of equally many neighbours."""
    steps, values = (np.array(part, dtype=np.float64) for part in (series.steps, series.values))
    if len(steps) > _MOST_POINTS:
        parts = np.array_split(np.arange(len(steps)), _MOST_POINTS)
        steps, values = (np.array([array[part].mean() for part in parts]) for array in (steps, values))
    return [round(float(step), 1) for step in steps], [float(f"{value:.5g}") for value in values]
