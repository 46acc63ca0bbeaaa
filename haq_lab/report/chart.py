"""What the page's charts share: a chart with its variants, colours for light and dark, labels that break."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any, NamedTuple

import plotly.graph_objects as go

# Seven hues that stay apart for the colour-blind and stand on white as on near-black.
COLOURS = ("#3b78d8", "#e07b16", "#1f9e89", "#d64550", "#8a63d2", "#b3941f", "#2ba8d9")
GREY = "#8a8f98"  # of lines that only guide the eye
DASHES, SYMBOLS = ("solid", "dot", "dashdot"), ("circle", "diamond", "square")  # where there are more names than hues
HEAT = "Viridis"
LABEL = 24  # characters of a line on an axis: a phone has little room beside the bars


class Look(NamedTuple):
    """What tells a line or a point from others."""

    colour: str
    dash: str
    symbol: str


@dataclass(frozen=True)
class Chart:
    """A figure of the page, in one variant or in several of which the reader chooses one."""

    title: str
    caption: str
    variants: dict[str, go.Figure]


def styled(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """A figure in the page's manner; text and lines are coloured by the page itself, by its theme."""
    clear = "rgba(0,0,0,0)"
    figure.update_layout(template="none", height=height, margin={"l": 12, "r": 12, "t": 28, "b": 12}, colorway=COLOURS)
    figure.update_layout(paper_bgcolor=clear, plot_bgcolor=clear, font={"size": 13, "family": "system-ui, sans-serif"})
    legend = {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0}
    return figure.update_layout(legend=legend, hoverlabel={"align": "left", "namelength": -1}, **layout)


def axes(figure: go.Figure, x: str, y: str) -> go.Figure:
    """Titles, and axes that make room for their labels."""
    figure.update_xaxes(automargin=True, zeroline=False, title={"text": x, "standoff": 8})
    figure.update_yaxes(automargin=True, zeroline=False, title={"text": y, "standoff": 8})
    return figure


def broken(label: str) -> str:
    """A label in lines of at most `LABEL` characters."""
    return "<br>".join(textwrap.wrap(label, LABEL)) or label


def bar_room(labels: Iterable[str]) -> int:
    """Pixels that horizontal bars with these labels need."""
    return sum(26 + 17 * (broken(label).count("<br>") + 1) for label in labels)


def whole_numbers(count: int) -> dict[str, int]:
    """Of an axis that counts from 0: ticks on whole numbers alone, not too many."""
    return {"tick0": 0, "dtick": max(1, count // 5)}


def looks(names: list[str]) -> dict[str, Look]:
    """A look for each name: all hues first, then the same with another dash and symbol."""
    all_looks = [Look(hue, *kind) for kind, hue in product(zip(DASHES, SYMBOLS, strict=True), COLOURS)]
    return dict(zip(names, cycle(all_looks), strict=False))
