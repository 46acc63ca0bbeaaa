"""Draw figures of results with matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from haq_lab.utils.plotting import save


def mean_over_experts(layers: pd.DataFrame) -> pd.DataFrame:
    """Average a run's `layers.csv` over experts.

    Args:
        layers: The content of `layers.csv`.

    Returns:
        One row for each layer and linear, with the columns `linear`, `layer`, `output_error`, `error_rtn` and
        `smoothing_strength`. The same projection of different experts counts as one linear.
    """
    kinds = layers["linear"].str.replace(r"\.experts\.\d+\.", ".experts.", regex=True)
    values = layers[["output_error", "error_rtn", "smoothing_strength"]].astype(float)
    return values.groupby([kinds, layers["layer"]], sort=False).mean().reset_index()


def layer_figure(layers: pd.DataFrame, path: Path) -> Path:
    """Draw the output error and the smoothing strength of each projection over the layers.

    Args:
        layers: The content of a run's `layers.csv`.
        path: The image file.

    Returns:
        The path of the image file.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for linear, rows in mean_over_experts(layers).groupby("linear", sort=False):
        name = str(linear).rpartition(".")[2]
        if rows["output_error"].notna().any():
            top.semilogy(rows["layer"], rows["output_error"], marker=".", label=name)
        if rows["smoothing_strength"].notna().any():
            bottom.plot(rows["layer"], rows["smoothing_strength"], marker=".", label=name)
    top.set(ylabel="output error", title="Output error from weight rounding, by linear")
    bottom.set(ylabel="smoothing strength", xlabel="layer", ylim=(-0.05, 1.05))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    if top.has_data():
        top.legend(ncols=4, fontsize="small")
    return save(figure, path)


def comparison_figure(runs: pd.DataFrame, path: Path) -> Path:
    """Draw the change of perplexity from full precision: one panel for each dataset, one bar for each run.

    Args:
        runs: Finished runs from `haq_lab.results.load`.
        path: The image file.

    Returns:
        The path of the image file.
    """
    columns = [column for column in runs.columns if column.startswith("change_percent.")]
    widest = runs["name"].map(len).max() / 12  # inches for the names
    figure = Figure(figsize=(widest + 4 * max(len(columns), 1), 1.5 + 0.4 * len(runs)), layout="constrained")
    panels = figure.subplots(1, max(len(columns), 1), squeeze=False, sharey=True)[0]
    for panel, column in zip(panels, columns, strict=False):
        values = runs[column].to_numpy(float)
        positions = range(len(runs))  # not names, because runs with the same name would share a bar
        bars = panel.barh(positions, np.nan_to_num(values, posinf=0, neginf=0), color="#4c72b0")
        reasons = runs.get(f"null.perplexity.{column.partition('.')[2]}", pd.Series(None, runs.index, dtype=object))
        missing = [f"null ({reason})" if isinstance(reason, str) else "not evaluated" for reason in reasons]
        labels = [
            f"{value:+.2f} %" if np.isfinite(value) else text for value, text in zip(values, missing, strict=True)
        ]
        panel.bar_label(bars, labels=labels, padding=3)
        panel.set_yticks(positions, runs["name"])
        panel.set(xlabel="change from full precision, %", title=column.partition(".")[2])
        panel.margins(x=0.25)
        panel.invert_yaxis()
    return save(figure, path)
