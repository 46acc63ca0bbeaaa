"""Define the charts of the page, and their common style."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from haq_lab.utils.plotting import linear_width, needs_log

# Seven hues that colour-blind readers can distinguish, on a white or a nearly black page.
COLOURS = ("#3b78d8", "#e07b16", "#1f9e89", "#d64550", "#8a63d2", "#b3941f", "#2ba8d9")
GREY = "#8a8f98"  # for auxiliary lines
DASHES, SYMBOLS = ("solid", "dot", "dashdot"), ("circle", "diamond", "square")  # if there are more names than hues
HEAT = "Viridis"
LABEL = 24  # characters in a line of an axis label, so that the page fits a phone


class Look(NamedTuple):
    """Style of one line or group of points."""

    colour: str
    dash: str
    symbol: str


@dataclass(frozen=True)
class Chart:
    """One chart of the page. The reader chooses one of its variants.

    Attributes:
        title: Title of the chart.
        caption: Sentence below the chart.
        variants: Figures by the name of the variant.
    """

    title: str
    caption: str
    variants: dict[str, go.Figure]


@dataclass(frozen=True)
class Scale:
    """The scale of an axis that contains zero: linear, or logarithmic on both sides of it (asinh).

    Attributes:
        values: The values on the axis.
        log: Whether the scale is logarithmic.
    """

    values: tuple[float, ...]
    log: bool

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        """Return the scale for values: logarithmic if one of them would hide the others' differences.

        Example:
            >>> Scale.of([0.5, 3.0, 140.0]).log
            True
        """
        values = tuple(map(float, values))
        return cls(values, needs_log(values))

    def place(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return the places of values on the axis."""
        plain = np.asarray(values, dtype=float)
        return np.arcsinh(plain / linear_width(self.values)) if self.log else plain

    def axis(self) -> dict[str, Any]:
        """Return plotly's settings of the axis, with ticks at zero and at powers of ten if it is logarithmic."""
        if not self.log:
            return {}
        sizes = [abs(value) for value in self.values if np.isfinite(value)]
        powers = linear_width(self.values) * 10.0 ** np.arange(
            1 + np.floor(np.log10(max(sizes) / linear_width(self.values)))
        )
        ticks = [*(-powers[::-1] if min(self.values) < 0 else []), 0.0, *powers]
        return {"tickvals": self.place(ticks).tolist(), "ticktext": [f"{tick:g}" for tick in ticks]}


def styled(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """Apply the page's style to a figure. The page itself sets the colours of text and lines, by its theme.

    Args:
        figure: The figure, which is changed.
        height: Height in pixels.
        layout: Further settings of plotly's layout.
    """
    clear = "rgba(0,0,0,0)"
    figure.update_layout(template="none", height=height, margin={"l": 12, "r": 12, "t": 28, "b": 12}, colorway=COLOURS)
    figure.update_layout(paper_bgcolor=clear, plot_bgcolor=clear, font={"size": 13, "family": "system-ui, sans-serif"})
    legend = {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0}
    return figure.update_layout(legend=legend, hoverlabel={"align": "left", "namelength": -1}, **layout)


def axes(figure: go.Figure, x: str, y: str) -> go.Figure:
    """Set the titles of the axes, and leave enough space for their labels."""
    figure.update_xaxes(automargin=True, zeroline=False, title={"text": x, "standoff": 8})
    figure.update_yaxes(automargin=True, zeroline=False, title={"text": y, "standoff": 8})
    return figure


def wrapped(label: str) -> str:
    """Break a label into lines of at most `LABEL` characters."""
    return "<br>".join(textwrap.wrap(label, LABEL)) or label


def bar_height(labels: Iterable[str]) -> int:
    """Return the height in pixels of horizontal bars with these labels."""
    return sum(26 + 17 * (wrapped(label).count("<br>") + 1) for label in labels)


def whole_numbers(count: int) -> dict[str, int]:
    """Return the settings of an axis from 0 to `count` that has about five ticks, all at whole numbers."""
    return {"tick0": 0, "dtick": max(1, count // 5)}


def looks(names: list[str]) -> dict[str, Look]:
    """Return a style for each name. After all hues are used, they repeat with another dash and symbol."""
    all_looks = [Look(hue, *kind) for kind, hue in product(zip(DASHES, SYMBOLS, strict=True), COLOURS)]
    return dict(zip(names, cycle(all_looks), strict=False))
