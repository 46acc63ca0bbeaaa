"""Draw the effects of quantization: perplexity and KL by method, output error and smoothing by layer, and outliers.

Each function returns a `Chart`, or the reason why there is none.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from torch import Tensor, stack

from haq_lab.calibration.channel_ranges import Ranges
from haq_lab.report.chart import HEAT, Chart, Scale, axes, bar_height, looks, styled, whole_numbers, wrapped
from haq_lab.report.collect import Collection
from haq_lab.results.figures import change_interval, mean_over_experts
from haq_lab.results.windows import over_seeds, scores, windows_of

TINY = 1e-12  # lower bound of a median, for layers in which most channels are 0
SCALE = "The axis is logarithmic if one run would hide the differences of the others."
SPACE = "\N{EN SPACE}"  # keeps a text off its whisker
ROOM = 0.3  # space for the text behind the longest bar, as a part of the bars' space
CELLS = 128  # columns of an outlier map; each shows the largest of several channels


def perplexity(collection: Collection) -> Chart | str:
    """Draw the change of perplexity from full precision: one bar for each run, one variant for each dataset."""
    variants = {}
    for model, dataset, runs in _measured(collection, "change_percent."):
        change = runs[f"change_percent.{dataset}"]
        known = runs[[f"perplexity.{dataset}", f"perplexity_fp.{dataset}"]].to_numpy()
        told = [f"{quantised:.4f}, full precision {fp:.4f}" for quantised, fp in known]
        texts = list(map("{:+.2f} %".format, change))
        figure = _bars(runs["label"], change, change_interval(runs, dataset), texts, told)
        variants[f"{model}, {dataset}"] = axes(figure, "change from full precision, %", "")
    if not variants:
        return "No finished run of a quantised model has a perplexity (measure=[perplexity])."
    caption = "Change of perplexity from the full precision of the same run. Whiskers: 95 % interval over the windows."
    return Chart("Perplexity by method", f"{caption} {SCALE}", variants)


def divergence(collection: Collection) -> Chart | str:
    """Draw the KL divergence from full precision: one bar for each run, one variant for each dataset."""
    variants = {}
    for model, dataset, runs in _measured(collection, "kl."):
        values = runs[f"kl.{dataset}"]
        texts = list(map("{:.5f}".format, values))
        figure = _bars(
            runs["label"], values, _intervals(runs, dataset), texts, [f"{text} nats/token" for text in texts]
        )
        variants[f"{model}, {dataset}"] = axes(figure, "nats per token", "")
    if not variants:
        return "No finished run of a quantised model has a KL divergence (measure=[perplexity])."
    caption = "KL divergence from the full precision of the same run. Whiskers: 95 % interval over the windows."
    return Chart("KL divergence by method", f"{caption} {SCALE}", variants)


def _measured(collection: Collection, kind: str) -> list[tuple[str, str, pd.DataFrame]]:
    """Return model, dataset and runs for each dataset on which quantised runs have metrics of a kind, such as `kl.`."""
    datasets = [name.partition(".")[2] for name in map(str, collection.shown) if name.startswith("change_percent.")]
    found = []
    for (model, runs), dataset in product(collection.by_model(), datasets):
        if f"{kind}{dataset}" in runs:
            own = runs[runs[f"{kind}{dataset}"].notna() & runs["quantized"]]
            found += [(model, dataset, own)] if len(own) else []
    return found


def _bars(
    labels: pd.Series, values: pd.Series, ends: tuple[pd.Series, pd.Series], texts: list[str], told: list[str]
) -> go.Figure:
    """Draw horizontal bars with whiskers.

    Args:
        labels: Names of the bars.
        values: Their lengths.
        ends: Lower and upper ends of their whiskers, NaN for none.
        texts: Text behind each whisker.
        told: What a hover tells, besides the label.
    """
    figure, scale = styled(go.Figure(), 100 + bar_height(labels), showlegend=False), Scale.of(values)
    place, low, high = (scale.place(numbers) for numbers in (values, *ends))
    names = labels.map(wrapped)
    whiskers = {"type": "data", "symmetric": False, "array": high - place, "arrayminus": place - low}
    figure.add_bar(
        y=names,
        x=place,
        orientation="h",
        error_x=None if np.isnan(low).all() else whiskers,
        customdata=np.stack([labels, told], axis=1),
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
    )
    right, left = np.fmax(np.fmax(place, high), 0), np.fmin(np.fmin(place, low), 0)
    text = {
        "mode": "text",
        "text": [f"{SPACE}{text}" for text in texts],
        "textposition": "middle right",
        "cliponaxis": False,
        "hoverinfo": "skip",
    }
    figure.add_scatter(x=right, y=names, **text)
    space = np.ptp([*right[np.isfinite(right)], *left[np.isfinite(left)], 0.0])
    figure.update_xaxes(
        range=[
            left[np.isfinite(left)].min(initial=0) - 0.03 * space,
            right[np.isfinite(right)].max(initial=0) + ROOM * space,
        ],
        **scale.axis(),
    )
    return figure.update_yaxes(autorange="reversed", type="category")  # a name such as 5GB is not a number


def _intervals(runs: pd.DataFrame, dataset: str) -> tuple[pd.Series, pd.Series]:
    """Return both ends of the 95 % interval of each run's KL divergence, NaN for runs that recorded no windows."""
    ends = []
    for folder in runs["folder"]:
        table = windows_of(Path(folder))
        found = None if table is None else scores([table], dataset, "kl")
        mean = None if found is None else over_seeds(found)
        ends.append((np.nan, np.nan) if mean is None else (max(mean.low, 0.0), mean.high))
    low, high = zip(*ends, strict=True)
    return pd.Series(low, runs.index, dtype=float), pd.Series(high, runs.index, dtype=float)


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
