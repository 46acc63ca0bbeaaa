"""Draw the effects of quantization: perplexity by method, output error and smoothing by layer, and outliers.

Each function returns a `Chart`, or the reason why there is none.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from torch import Tensor, stack

from haq_lab.calibration.channel_ranges import Ranges
from haq_lab.report.chart import HEAT, Chart, axes, bar_height, looks, styled, whole_numbers, wrapped
from haq_lab.report.collect import Collection
from haq_lab.results.figures import mean_over_experts

TINY = 1e-12  # lower bound of a median, for layers in which most channels are 0
CELLS = 128  # columns of an outlier map; each shows the largest of several channels


def perplexity(collection: Collection) -> Chart | str:
    """Draw the change of perplexity from full precision: one bar for each run, one variant for each dataset."""
    variants = {}
    columns = [name for name in map(str, collection.finished) if name.startswith("change_percent.")]
    for (model, runs), column in product(collection.by_model(), columns):
        runs = runs[runs[column].notna() & runs["quantized"]]
        if not runs.empty:
            dataset = column.partition(".")[2]
            variants[f"{model}, {dataset}"] = _bars(runs, dataset)
    if not variants:
        return "No finished run of a quantised model has a perplexity (measure=[perplexity])."
    return Chart(
        "Perplexity by method",
        "Change of perplexity from the full precision of the same run. Whiskers: 95 % interval over the windows.",
        variants,
    )


def _bars(runs: pd.DataFrame, dataset: str) -> go.Figure:
    figure = styled(go.Figure(), 100 + bar_height(runs["label"]))
    figure.add_bar(
        y=runs["label"].map(wrapped),
        x=runs[f"change_percent.{dataset}"],
        orientation="h",
        text=runs[f"change_percent.{dataset}"].map("{:+.2f} %".format),
        textposition="auto",
        error_x=_whiskers(runs, dataset),
        customdata=runs[["label", f"perplexity.{dataset}", f"perplexity_fp.{dataset}"]],
        hovertemplate="%{customdata[0]}<br>%{customdata[1]:.4f}, full precision %{customdata[2]:.4f}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", type="category")  # a name such as 5GB is not a number
    return axes(figure, "change from full precision, %", "")


def _whiskers(runs: pd.DataFrame, dataset: str) -> dict[str, Any] | None:
    """Return the 95 % intervals of the changes of perplexity, as plotly's error bars. None if no run has one."""
    ends = [f"dlnppl.{dataset}.{end}" for end in ("low", "high")]
    if not set(ends) <= set(runs):
        return None
    low, high = (np.expm1(runs[end].astype(float)) * 100 for end in ends)
    change = runs[f"change_percent.{dataset}"]
    return {"type": "data", "symmetric": False, "array": high - change, "arrayminus": change - low}


def layers(collection: Collection) -> Chart | str:
    """Draw the output error and smoothing strength of each linear over the layers, one variant for each run."""
    if "layers" not in collection.tables:
        return "No run has quantised a model (layers.csv)."
    variants = {}
    smoothed_first = sorted(
        collection.tables["layers"].groupby("run", sort=False), key=lambda run: -run[1]["smoothing_strength"].count()
    )
    for run, table in smoothed_first:
        if table[["output_error", "smoothing_strength"]].notna().any(axis=None):
            variants[str(run)] = _layer_figure(table)
    if not variants:
        return "No run has calibrated, so there are no output errors and smoothing strengths."
    caption = (
        "Top: mean squared output error from rounding the weights. Bottom: smoothing strength. Both are averaged over "
        "experts."
    )
    return Chart("Error and strength by layer", caption, variants)


def _layer_figure(table: pd.DataFrame) -> go.Figure:
    values = mean_over_experts(table)
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4])
    styled(figure, 520)
    for linear, look in looks(list(values["linear"].unique())).items():
        rows = values[values["linear"] == linear]
        line = {"x": rows["layer"], "mode": "lines+markers", "marker": {"size": 5}}
        line |= {"line": {"color": look.colour, "dash": look.dash}}
        line |= {"name": linear.rpartition(".")[2], "legendgroup": linear}
        figure.add_scatter(
            **line,
            y=rows["output_error"],
            customdata=rows[["linear", "error_rtn"]],
            hovertemplate="%{customdata[0]}, layer %{x}<br>%{y:.3g} (RTN %{customdata[1]:.3g})<extra></extra>",
        )
        hover = f"{linear}, layer %{{x}}<br>strength %{{y:.3f}}<extra></extra>"
        figure.add_scatter(**line, y=rows["smoothing_strength"], showlegend=False, hovertemplate=hover, row=2, col=1)
    axes(figure, "", "")
    figure.update_xaxes(title_text="layer", row=2)
    figure.update_xaxes(**whole_numbers(values["layer"].nunique()))
    figure.update_yaxes(title_text="output error", type="log", exponentformat="power", row=1)
    figure.update_yaxes(title_text="strength", range=[-0.05, 1.05], row=2)
    return figure


def outliers(collection: Collection) -> Chart | str:
    """Draw heat maps of outlier channels before and after smoothing, one variant for each run.

    A cell is the largest |x| of a channel, divided by the median over the channels of the layer. This ratio matters,
    because all channels of a layer share one scale.
    """
    if not collection.ranges:
        return "No run has calibrated (ranges.safetensors). RTN with dynamic activations does not calibrate."
    smoothing = {run: ranges for run, ranges in collection.ranges.items() if ranges.smoothed}
    if not smoothing:
        return "No run has smoothed (quantizer=smoothquant or haq)."
    variants = {run: _outlier_figure(ranges) for run, ranges in smoothing.items()}
    caption = (
        "Largest |x| of each input channel on the calibration text, divided by the layer's median channel. A column "
        f"shows the largest of each {CELLS}th of the channels. Bright spots are outlier channels."
    )
    return Chart("Outliers before and after smoothing", caption, variants)


def _outlier_figure(ranges: Ranges) -> go.Figure:
    before, after = _maps(ranges.before), _maps(ranges.after)
    titles = [f"{site}, {state}" for site in before for state in ("before", "after")]
    spacing = {"horizontal_spacing": 0.04, "vertical_spacing": 0.05}
    figure = make_subplots(len(before), 2, shared_yaxes=True, shared_xaxes=True, subplot_titles=titles, **spacing)
    bar = {
        "title": {"text": "log10 of the largest |x| over the median", "side": "top"},
        "thickness": 10,
        "orientation": "h",
        "y": -0.12,
    }
    styled(figure, 120 + 180 * len(before), coloraxis={"colorscale": HEAT, "colorbar": bar})
    for row, site in enumerate(before, start=1):
        for column, values in enumerate((before[site], after[site]), start=1):
            heat = {"z": np.log10(np.maximum(values, 0.1)).astype(np.float32), "coloraxis": "coloraxis"}
            hover = f"{site}, layer %{{y}}, part %{{x}} of {values.shape[1]}<br>10^%{{z:.2f}}<extra></extra>"
            figure.add_heatmap(**heat, hovertemplate=hover, row=row, col=column)
    figure.update_annotations(font={"size": 11})
    axes(figure, "", "")
    figure.update_xaxes(showticklabels=False, ticks="")
    figure.update_yaxes(**whole_numbers(len(next(iter(before.values())))))
    return figure


def _maps(sites: dict[str, list[Tensor]]) -> dict[str, NDArray[np.float32]]:
    """Return a map (layers, at most CELLS) for each site: the largest channel of each part, over the median channel."""
    maps = {}
    for site, rows in sites.items():
        values = stack(rows).numpy()
        values = values / np.maximum(np.median(values, axis=1, keepdims=True), TINY)
        starts = np.unique(np.linspace(0, values.shape[1], CELLS, endpoint=False).astype(int))
        maps[site.rpartition(".")[2]] = np.maximum.reduceat(values, starts, axis=1)
    return maps
