"""Draw figures of results with matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from haq_lab.results.run_labels import METHODS, with_labels
from haq_lab.utils.console import format_percent
from haq_lab.utils.plotting import linear_width, needs_log, save

WHISKERS = "(whiskers: 95 % interval; ±: standard error)"
HIGHLIGHT, QUIET = "#3b78d8", "#a9b4c4"  # colours of HAQ's bars and of the others


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

    Whiskers are 95 % intervals over the windows. The axis is logarithmic if one run would hide the others' differences.

    Args:
        runs: Finished runs from `haq_lab.results.load`. If some are quantised, the others are left out.
        path: The image file.

    Returns:
        The path of the image file.
    """
    runs = with_labels(runs[runs["quantized"]] if runs["quantized"].any() else runs)
    names = runs["of"] + ": " + runs["label"] if runs["of"].nunique() > 1 else runs["label"]
    columns = [column for column in runs.columns if column.startswith("change_percent.")]
    widest = names.map(len).max() / 12  # inches for the names
    figure = Figure(figsize=(widest + 4.5 * max(len(columns), 1), 1.2 + 0.42 * len(runs)), layout="constrained")
    panels = figure.subplots(1, max(len(columns), 1), squeeze=False, sharey=True)[0]
    colours = [HIGHLIGHT if method == METHODS["haq"] else QUIET for method in runs["method"]]
    positions = range(len(runs))  # not names, because runs with the same name would share a bar
    for panel, column in zip(panels, columns, strict=False):
        dataset = column.partition(".")[2]
        values = runs[column].to_numpy(float)
        drawn = np.nan_to_num(values, posinf=0, neginf=0)
        low, high = (np.nan_to_num(ends.to_numpy(float)) for ends in change_interval(runs, dataset))
        whiskers = np.stack([np.where(low, drawn - low, 0), np.where(high, high - drawn, 0)]).clip(min=0)
        look = {"color": colours, "xerr": whiskers, "error_kw": {"ecolor": "#333333", "elinewidth": 1.2, "capsize": 3}}
        panel.barh(positions, drawn, height=0.65, **look)
        ends = (drawn + whiskers[1]).clip(min=0)  # a label left of its bar would cover the run's name
        for place, text in zip(zip(ends, positions, strict=True), _bar_labels(runs, dataset), strict=True):
            panel.annotate(text, place, (4, 0), textcoords="offset points", va="center", fontsize=9)
        panel.set_yticks(positions, names)
        panel.tick_params(axis="y", length=0)
        if needs_log(values):
            panel.set_xscale("asinh", linear_width=linear_width(values))
            panel.xaxis.set_major_formatter("{x:g}")
        panel.axvline(0, color="#333333", linewidth=0.8)
        label = "change of perplexity from full precision, %"
        panel.set(xlabel=f"{label}\n{WHISKERS}" if whiskers.any() else label, title=dataset)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.margins(x=0.3)
    panels[0].invert_yaxis()
    return save(figure, path)


def change_interval(runs: pd.DataFrame, dataset: str) -> tuple[pd.Series, pd.Series]:
    """Return both ends of the 95 % intervals of the changes of perplexity, in %. NaN if a run has none.

    Args:
        runs: Runs from `haq_lab.results.load`.
        dataset: Name of the dataset.
    """
    unknown = pd.Series(np.nan, runs.index)
    low, high = (runs.get(f"dlnppl.{dataset}.{end}", unknown).astype(float) for end in ("low", "high"))
    return low.map(np.expm1) * 100, high.map(np.expm1) * 100


def _bar_labels(runs: pd.DataFrame, dataset: str) -> list[str]:
    """Return the change of each run with its standard error, or why there is none."""
    labels = []
    for run in runs.to_dict("records"):
        change, reason = run[f"change_percent.{dataset}"], run.get(f"null.perplexity.{dataset}")
        if np.isfinite(change):
            labels.append(format_percent(change, run.get(f"change_percent_stderr.{dataset}")))
        else:
            labels.append(f"null ({reason})" if isinstance(reason, str) else "not evaluated")
    return labels
