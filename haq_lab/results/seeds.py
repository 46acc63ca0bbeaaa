"""Group runs that differ only in their seeds, and estimate their metrics with an error of both text and seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from haq_lab.measure.metrics import find_metric
from haq_lab.results.windows import over_seeds, scores, windows_of
from haq_lab.utils.console import format_percent, print_table, say

SEED = "seed"  # last part of the names of settings that are seeds, such as `calibration.seed`
UNRELATED = ("config.checkpoint.", "config.result_cache.", "config.tracking.", "config.force", "config.seeds")
COLUMNS = {"nll": "dlnppl", "kl": "kl"}  # columns of windows.csv, and the metrics that they estimate


def seed_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each group of finished runs that differ only in their seeds.

    Args:
        runs: Table of runs from `haq_lab.results.load`.

    Returns:
        The columns of the group's first run, with the mean of each metric. Also:

        - `runs`: number of runs in the group
        - `spread.<metric>`: standard deviation over the runs, NaN for a single run
        - `dlnppl.<data>.stderr`, `.low`, `.high` and the same of `kl`: the standard error and the 95 % interval of the
          mean, in nats a token. They contain the error of the text and that of the seeds.

    Example:
        >>> seed_table(load("runs/sweep"))[["name", "runs", "kl.wikitext2", "kl.wikitext2.stderr"]]
    """
    finished = runs[runs["status"] == "finished"]
    if finished.empty:
        return finished
    rows = [_row(group) for _, group in finished.groupby(finished.apply(_identity, axis=1), sort=False)]
    table = pd.DataFrame(rows)
    table.attrs = runs.attrs
    return table


def _identity(run: pd.Series) -> str:
    """Return all settings of a run but its seeds, in a form that can be compared."""
    names = [name for name in map(str, run.index) if name.startswith("config.") and not name.startswith(UNRELATED)]
    settings = {name: None if _missing(run[name]) else run[name] for name in names if not name.endswith(f".{SEED}")}
    return json.dumps(settings, default=str)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _row(group: pd.DataFrame) -> dict[str, Any]:
    row: dict[str, Any] = {str(name): value for name, value in group.iloc[0].items()}
    row["runs"] = len(group)
    row["name"] = " ".join(part for part in str(row["name"]).split() if f".{SEED}=" not in part) or row["name"]
    for name in map(str, group):
        if pd.api.types.is_numeric_dtype(group[name]) and (find_metric(name) or name.startswith("change_percent.")):
            row[name] = group[name].mean()
            row[f"spread.{name}"] = group[name].std(ddof=1)
    tables = [windows_of(Path(folder)) for folder in group["folder"]]
    recorded = [table for table in tables if table is not None]
    if len(recorded) < len(tables):
        return row
    for text in dict.fromkeys(recorded[0]["data"]):
        for column, metric in COLUMNS.items():
            if (found := scores(_paired(recorded) if column == "nll" else recorded, text, column)) is not None:
                mean = over_seeds(found)
                row[f"{metric}.{text}"] = mean.mean
                row |= {f"{metric}.{text}.{part}": getattr(mean, part) for part in ("stderr", "low", "high")}
        if f"change_percent.{text}" in row and f"dlnppl.{text}" in row:
            row[f"change_percent.{text}"] = math.expm1(row[f"dlnppl.{text}"]) * 100
            row[f"change_percent_stderr.{text}"] = math.exp(row[f"dlnppl.{text}"]) * row[f"dlnppl.{text}.stderr"] * 100
    return row


def _paired(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Return tables whose column `nll` is the difference from full precision."""
    return [table.assign(nll=table["nll"] - table["nll_fp"]) if "nll_fp" in table else table for table in tables]


def show_seeds(groups: pd.DataFrame) -> None:
    """Print the groups of `seed_table`: KL and the change of perplexity, each with its spread and its interval.

    Args:
        groups: Table from `seed_table`.
    """
    texts = [name.partition(".")[2] for name in map(str, groups) if name.startswith("change_percent.")]
    table = Table("run", "seeds")
    for text in texts:
        for head in ("KL", "95 % interval", "over\nfp", "spread\nof seeds"):
            table.add_column(f"{text}\n{head}" if head == "KL" else head, justify="right", no_wrap=True)
    for _, group in groups.iterrows():
        cells = [str(group["name"]), str(group["runs"])]
        for text in texts:
            kl, low, high = (group.get(f"kl.{text}{part}", math.nan) for part in ("", ".low", ".high"))
            change, error, spread = (
                group.get(f"{name}.{text}", math.nan)
                for name in ("change_percent", "change_percent_stderr", "spread.change_percent")
            )
            cells.append("" if math.isnan(kl) else f"{kl:.5f}")
            cells.append("" if math.isnan(low) else f"{max(low, 0):.5f} to {high:.5f}")
            cells.append("" if math.isnan(change) else format_percent(change, error))
            cells.append("" if math.isnan(spread) else f"{spread:.2f} %")
        table.add_row(*cells)
    print_table(table)
    say("Intervals and errors contain the text and the seeds. The spread is the standard deviation over the seeds.")
