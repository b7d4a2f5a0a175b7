"""Fills a page's template, and builds figures as Plotly describes them: data and layout without colours.

Every trace says in `meta` how to colour it: `arm`, a number from 0 (None for a trace of no arm), and its `part` in the
figure. `page.js` gives it the colours of the light or dark theme.
"""

import base64
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fp4rl.spec.errors import NotFoundError

Trace = dict[str, Any]
Layout = dict[str, Any]

HEAT = [[0.0, "#f7f4ee"], [0.35, "#f2c879"], [0.7, "#d9722e"], [1.0, "#7d1f14"]]  # pale to dark: more is worse
COLOURS = 6  # --arm-0 to --arm-5 in page.css
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")
_HERE = Path(__file__).parent
_LEVEL = 4  # of zlib: 9 makes Plotly 4 % smaller and takes 0.1 s longer


@dataclass(frozen=True)
class Figure:
    """One figure; `words` describes it for a screen reader."""

    id: str
    title: str
    words: str
    data: Sequence[Trace]
    layout: Layout


def render(template: Path, figures: Iterable[Figure], **contents: Any) -> str:
    """Fill a template that extends `base.html.j2`. The same contents give the same text, byte for byte.

    Raises `NotFoundError` where Jinja or Plotly (the extra `report`) is not installed.
    """
    try:
        environment = _environment(template.parent)
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise NotFoundError(f"an HTML page needs {error.name}; pip install 'fp4rl[report]'") from None
    files = {name: (_HERE / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    script = get_plotlyjs()
    drawn = [{"id": figure.id, "data": figure.data, "layout": figure.layout} for figure in figures]
    contents |= {
        "figures": drawn,
        "plotly": _packed(script),
        "plotly_licence": script.partition("*/")[0].strip("/* \n"),
    }
    return str(environment.get_template(template.name).render(**contents, **files))


def _packed(script: str) -> str:
    """Return a script as base64 of its deflated text, which `page.js` unpacks: Plotly takes 2.0 MB instead of 4.8."""
    return base64.b64encode(zlib.compress(script.encode(), _LEVEL)).decode()


@lru_cache
def _environment(folder: Path) -> Any:
    """Return the templates of `folder` and of this room, each compiled once."""
    import jinja2

    loader, strict = jinja2.FileSystemLoader([folder, _HERE]), jinja2.StrictUndefined
    own = jinja2.Environment(loader=loader, undefined=strict, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    own.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return own


def line(x: Sequence[Any], y: Sequence[Any], name: str, arm: int | None, **more: Any) -> Trace:
    """Return a line, or what `mode` says, as Plotly's scatter trace."""
    part = more.pop("part", "line")
    return _scatter(x, y, part, arm, {"mode": "lines", "name": name, "line": {"width": 2}} | more)


def marks(x: Sequence[Any], y: Sequence[Any], part: str, arm: int | None, **more: Any) -> Trace:
    """Return single marks as Plotly's scatter trace."""
    return _scatter(x, y, part, arm, {"mode": "markers"} | more)


def _scatter(x: Sequence[Any], y: Sequence[Any], part: str, arm: int | None, more: Trace) -> Trace:
    return {"type": "scatter", "x": list(x), "y": list(y)} | more | {"meta": {"arm": arm, "part": part}}


def over_steps(title: str = "step", height: int = 260) -> Layout:
    """Return the layout of lines over steps or layers; `height` in pixels."""
    margin = {"l": 48, "r": 12, "t": 8, "b": 40}
    axes = {"xaxis": {"title": {"text": title}, "rangemode": "tozero"}, "yaxis": {"title": {"text": ""}}}
    return {"height": height, "margin": margin, "hovermode": "x unified", "showlegend": False} | axes


def in_rows(names: Sequence[str], title: str, row: int = 34) -> Layout:
    """Return the layout of one row for each name, the first on top; `row` is its height in pixels."""
    margin = {"l": 8, "r": 16, "t": 8, "b": 44}
    order = {"categoryorder": "array", "categoryarray": list(reversed(names))}
    axes = {"xaxis": {"title": {"text": title}}, "yaxis": {"type": "category", "automargin": True} | order}
    height = row * len(names) + 60
    return {"height": height, "margin": margin, "hovermode": "closest", "showlegend": False} | axes


def with_legend(layout: Layout) -> Layout:
    """Return the same layout with a legend above the figure."""
    legend = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}
    margin = layout["margin"] | {"t": 34}
    return layout | {"height": layout["height"] + 26, "margin": margin, "showlegend": True, "legend": legend}
