"""Specifications of the charts in Vega-Lite, and the script that draws them, which comes with vl-convert-python.

Strings that begin with "@" are replaced by page.js: "@x" by the field of the chosen x axis, "@axis" by its title, and
"@w:KEY" by a word of words.json in the language of the page. Colors are variables of page.css.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

from unmask.core import files
from unmask.core.errors import StoreError
from unmask.core.files import default_cache

PACKAGE: Final = "vl-convert-python"
Spec = dict[str, Any]

_SCHEMA: Final = "https://vega.github.io/schema/vega-lite/v6.json"  # a name; nothing is loaded from there
_DASHES: Final = [5, 4]
_BAR_HEIGHT: Final = 24  # pixels, with the gap
_COLORS: Final = 8  # in page.css
_LEGEND: Final = {"orient": "top", "columns": 3, "symbolType": "stroke", "symbolOpacity": 1}


# The script -----------------------------------------------------------------------------------------------------------


def is_installed() -> bool:
    """Return whether the package with the script is installed."""
    return importlib.util.find_spec("vl_convert") is not None


def script() -> str:
    """Return the script of Vega, Vega-Lite and Vega-Embed; it is kept in the cache, because bundling takes seconds."""
    path = default_cache() / "report" / f"vega-{metadata.version(PACKAGE)}.js"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if not text:
        import vl_convert

        text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
        with contextlib.suppress(StoreError):  # a cache that can't be written costs only time
            files.write_text(path, text)
    return text


# Charts over the run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlay:
    """The runs that one chart overlays."""

    runs: Sequence[str]  # names of all runs of the report, in the order of their colors
    members: Sequence[str]  # names of those in the chart
    group: int | None = None  # number of their tokenizer; None: the chart is about all runs

    @property
    def transform(self) -> list[Spec]:
        """The filter of the rows of these runs."""
        return [] if self.group is None else [{"filter": f"datum.group === {self.group}"}]

    def color(self, alone: str) -> Spec:
        """Return the color of a row by its run; of a single run, the color `alone`."""
        if len(self.runs) == 1:
            return {"value": f"var(--{alone})"}
        colors = [f"var(--c{number % _COLORS})" for number in range(len(self.runs))]
        scale, legend = {"domain": list(self.runs), "range": colors}, _LEGEND | {"values": list(self.members)}
        return {"field": "run", "type": "nominal", "title": None, "scale": scale, "legend": legend}


def loss_chart(overlay: Overlay) -> Spec:
    """Return the chart of training and validation loss, with the unigram lines and the borders of stages."""
    several = len(overlay.runs) > 1
    training: Spec = {"mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.45, "clip": True}, **_of("training")}
    validation: Spec = {"mark": {"type": "line", "point": True}, **_of("validation")}
    for layer, name in ((training, "training"), (validation, "validation")):
        color = overlay.color("c0") if several else _series(name)
        layer["encoding"] = {"y": _y("loss", "loss"), "color": color}
    validation["encoding"]["tooltip"] = [
        *([{"field": "run", "title": "@w:run"}] if several else []),
        {"field": "step", "title": "@w:axis_step", "format": ","},
        {"field": "loss", "title": "@w:validation", "format": ".3f"},
        {"field": "accuracy", "title": "@w:accuracy", "format": ".1%"},
        {"field": "bits_per_character", "title": "@w:bits_per_character", "format": ".3f"},
    ]
    unigram: Spec = {
        "data": {"name": "unigram"},
        "layer": [
            {"mark": {"type": "rule", "strokeDash": _DASHES, "color": "var(--muted)"}, "encoding": {"x": None}},
            {
                "mark": {"type": "text", "align": "right", "baseline": "bottom", "dy": -3, "color": "var(--muted)"},
                "encoding": {"x": {"value": "width"}, "text": {"value": "@w:unigram"}},
            },
        ],
        "encoding": {"y": _y("loss", "loss")},
    }
    for layer in (training, validation, unigram):
        layer["transform"] = overlay.transform
    border = _border_layer(overlay, labeled=True)
    return _over_run([border, unigram, training, validation], height=300)


def line_chart(table: str, field: str, form: str, overlay: Overlay) -> Spec:
    """Return the chart of one value over the run; `form` is its number format."""
    encoding: Spec = {
        "y": _y(field, field, form),
        "color": overlay.color("c0"),
        "tooltip": [
            {"field": "step", "title": "@w:axis_step", "format": ","},
            {"field": field, "title": f"@w:{field}", "format": form},
        ],
    }
    mark = {"type": "line", "point": table == "validation"}
    layer: Spec = {"mark": mark, **_of(table), "encoding": encoding, "transform": overlay.transform}
    return _over_run([_border_layer(overlay, labeled=False), layer], height=150)


def pairs_chart(run: int) -> Spec:
    """Return the chart of the accuracy on minimal pairs, with 95 % intervals and the line of chance."""
    color = {"field": "method", "type": "nominal", "title": None, "legend": _LEGEND}
    data = _of(f"pairs-{run}")
    chance = {"color": "var(--muted)", "strokeDash": _DASHES}
    layers: list[Spec] = [
        {"data": {"values": [{"chance": 0.5}]}, "mark": {"type": "rule", **chance},
         "encoding": {"x": None, "y": {"field": "chance", "type": "quantitative"}}},
        {"mark": {"type": "errorband", "opacity": 0.15}, **data,
         "encoding": {"y": _y("low", "accuracy", ".0%"), "y2": {"field": "high"}, "color": color}},
        {"mark": {"type": "line", "point": True}, **data,
         "encoding": {"y": _y("accuracy", "accuracy", ".0%"), "color": color}},
    ]  # fmt: skip
    return _over_run(layers, height=180)


def _over_run(layers: Sequence[Spec], height: int) -> Spec:
    axis = {"format": "~s", "grid": False, "tickCount": 6}
    x = {"field": "@x", "type": "quantitative", "title": "@axis", "axis": axis}
    return {
        "$schema": _SCHEMA,
        "width": "container",
        "height": height,
        "encoding": {"x": x},
        "layer": list(layers),
    }


def _of(table: str) -> Spec:
    return {"data": {"name": table}}


def _y(field: str, title: str, form: str = ".2~f") -> Spec:
    axis = {"format": form, "tickCount": 5}
    return {"field": field, "type": "quantitative", "title": f"@w:{title}", "scale": {"zero": False}, "axis": axis}


def _series(name: str) -> Spec:
    return {"datum": f"@w:{name}", "type": "nominal", "title": None, "legend": _LEGEND}


def _border_layer(overlay: Overlay, *, labeled: bool) -> Spec:
    """Return vertical lines where stages end; a label has the sequence lengths before and after."""
    text: Spec = {"mark": {"type": "text", "align": "left", "baseline": "top", "dx": 4}}
    text["encoding"] = {"text": {"field": "label"}, "y": {"value": 2}}
    rule: Spec = {"mark": {"type": "rule", "opacity": 0.6}}
    return {
        **_of("borders"),
        "transform": overlay.transform,
        "encoding": {"color": overlay.color("muted")},
        "layer": [rule, text] if labeled else [rule],
    }


# Charts of the predictions --------------------------------------------------------------------------------------------


def groups_chart(table: str, groups: int) -> Spec:
    """Return a bar chart of the accuracy on a number of groups of masked tokens."""
    y = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 260}}
    return {
        "$schema": _SCHEMA,
        "width": "container",
        "height": _BAR_HEIGHT * groups,
        **_of(table),
        "encoding": {"y": y, "x": {"field": "accuracy", "type": "quantitative", "scale": {"domain": [0, 1]},
                                   "axis": None}},
        "layer": [
            {"mark": {"type": "bar", "color": "var(--c0)", "height": {"band": 0.7}}},
            {"mark": {"type": "text", "align": "left", "dx": 5, "color": "var(--text)"},
             "encoding": {"text": {"field": "accuracy", "format": ".1%"}}},
        ],
    }  # fmt: skip


def calibration_chart(table: str) -> Spec:
    """Return the chart of accuracy against confidence; the area of a point is its number of masked tokens."""

    def axis(field: str) -> Spec:
        settings = {"scale": {"domain": [0, 1]}, "axis": {"format": ".0%"}}
        return {"field": field, "type": "quantitative", "title": f"@w:{field}", **settings}

    diagonal = {"values": [{"confidence": 0, "accuracy": 0}, {"confidence": 1, "accuracy": 1}]}
    both = {"x": axis("confidence"), "y": axis("accuracy")}
    tooltip = [
        {"field": "confidence", "title": "@w:confidence", "format": ".1%"},
        {"field": "accuracy", "title": "@w:accuracy", "format": ".1%"},
        {"field": "masked_tokens", "title": "@w:masked_tokens", "format": ","},
    ]
    size = {"field": "masked_tokens", "type": "quantitative", "legend": None, "scale": {"range": [15, 500]}}
    return {
        "$schema": _SCHEMA,
        "width": "container",
        "height": 280,
        "layer": [
            {"data": diagonal, "mark": {"type": "line", "strokeDash": _DASHES, "color": "var(--muted)"},
             "encoding": both},
            {**_of(table), "mark": {"type": "line", "color": "var(--c0)", "opacity": 0.6}, "encoding": both},
            {**_of(table), "mark": {"type": "point", "filled": True, "color": "var(--c0)", "opacity": 0.9},
             "encoding": {**both, "size": size, "tooltip": tooltip}},
        ],
    }  # fmt: skip
