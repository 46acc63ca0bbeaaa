"""Figures, drawn with matplotlib and written atomically."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from haq_lab.utils.plotting import save


def mean_over_experts(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over experts of a run's `layers.csv`: one row for each layer and kind of linear.

    Columns: `linear`, `layer`, `output_error`, `error_rtn`, `smoothing_strength`. One projection of different
    experts is one kind.
    """
    kinds = layers["linear"].str.replace(r"\.experts\.\d+\.", ".experts.", regex=True)
    values = layers[["output_error", "error_rtn", "smoothing_strength"]].astype(float)
    return values.groupby([kinds, layers["layer"]], sort=False).mean().reset_index()


def layer_figure(layers: pd.DataFrame, path: Path) -> Path:
    """Each projection's output error and smoothing strength over the layers, from a run's `layers.csv`."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for linear, rows in mean_over_experts(layers).groupby("linear", sort=False):
        name = str(linear).rpartition(".")[2]
        if rows["output_error"].notna().any():
            top.semilogy(rows["layer"], rows["output_error"], marker=".", label=name)
        if rows["smoothing_strength"].notna().any():
            bottom.plot(rows["layer"], rows["smoothing_strength"], marker=".", label=name)
    top.set(ylabel="weight error at the output", title="Error that the weights' rounding leaves, per linear")
    bottom.set(ylabel="smoothing strength", xlabel="layer", ylim=(-0.05, 1.05))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    if top.has_data():
        top.legend(ncols=4, fontsize="small")
    return save(figure, path)


def comparison_figure(runs: pd.DataFrame, path: Path) -> Path:
    """Perplexity over full precision, in %, a bar a run and a panel a dataset."""
    columns = [column for column in runs.columns if column.startswith("change_percent.")]
    widest = runs["name"].map(len).max() / 12  # inches that the names take
    figure = Figure(figsize=(widest + 4 * max(len(columns), 1), 1.5 + 0.4 * len(runs)), layout="constrained")
    panels = figure.subplots(1, max(len(columns), 1), squeeze=False, sharey=True)[0]
    for panel, column in zip(panels, columns, strict=False):
        values = runs[column].to_numpy(float)
        places = range(len(runs))  # not names, since runs with one name would share a bar
        bars = panel.barh(places, np.nan_to_num(values, posinf=0, neginf=0), color="#4c72b0")
        reasons = runs.get(f"null.perplexity.{column.partition('.')[2]}", pd.Series(None, runs.index, dtype=object))
        missing = [f"null ({reason})" if isinstance(reason, str) else "not evaluated" for reason in reasons]
        labels = [
            f"{value:+.2f} %" if np.isfinite(value) else text for value, text in zip(values, missing, strict=True)
        ]
        panel.bar_label(bars, labels=labels, padding=3)
        panel.set_yticks(places, runs["name"])
        panel.set(xlabel="perplexity over full precision, %", title=column.partition(".")[2])
        panel.margins(x=0.25)
        panel.invert_yaxis()
    return save(figure, path)
