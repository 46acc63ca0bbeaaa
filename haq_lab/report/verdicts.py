"""Say which runs of a table are the best beyond noise, from the values of their windows."""

from __future__ import annotations

import pandas as pd

from haq_lab.measure.metrics import Metric
from haq_lab.results.comparison import compare_with
from haq_lab.utils.errors import UserError

# Metrics of a text, and the columns of windows.csv that they average.
COLUMNS = {"perplexity": "nll", "change_percent": "nll", "kl": "kl", "token_agreement": "token_agreement"}


def best_runs(runs: pd.DataFrame, name: str, metric: Metric) -> set[str]:
    """Return the names of the runs whose value of a metric is the best, with those that cannot be told from it.

    Perplexity, KL and token agreement are compared by paired windows. Values that are printed with the same digits
    share the mark, because a reader sees no difference between them.

    Args:
        runs: Quantised runs on the same windows.
        name: Name of the metric.
        metric: How it is shown.

    Returns:
        The names. Empty if neither direction is better, or if no run is worse than another.
    """
    values = runs.set_index("name")[name].dropna()
    if not metric.direction or values.empty:
        return set()
    first = str(values.idxmin() if metric.direction == "lower" else values.idxmax())
    kind, _, text = name.partition(".")
    worse = _worse_by_windows(runs, first, text, COLUMNS[kind]) if kind in COLUMNS else None
    printed = values.map(metric.format)
    best = {first} if worse is None else set(map(str, values.index)) - worse
    best = set(map(str, printed[printed.isin(printed[list(best)])].index))
    return best if len(best) < len(values) else set()


def _worse_by_windows(runs: pd.DataFrame, first: str, text: str, column: str) -> set[str] | None:
    """Return the names of the runs that are worse than `first` beyond noise. None if a run recorded no windows."""
    folders = runs.set_index("name")["folder"]
    others = {str(name): [folder] for name, folder in folders.drop(first).items()}
    try:
        table = compare_with((first, [folders[first]]), others, text, column)
    except UserError:  # a run of an older version has no windows.csv
        return None
    return set(table[table["verdict"] == f"{first} is better"]["second"]) if len(table) else None


def verdict(text: str, measured: int, best: set[str]) -> str:
    """Return one sentence about the KL divergence of runs on a text. Empty if there is nothing to compare.

    Args:
        text: Name of the text.
        measured: Number of quantised runs with a KL divergence.
        best: The best of them, from `best_runs`.
    """
    if measured < 2:
        return ""
    if not best:
        return f"On {text}, the KL divergences of the {measured} runs cannot be told apart: more windows are needed."
    names = " and ".join(sorted(best))
    return f"On {text}, the KL divergence of {names} is lower than that of the others beyond noise."
