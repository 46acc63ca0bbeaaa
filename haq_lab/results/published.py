"""Compare measured metrics with published ones, which are in `published.csv` with their sources.

A row of this file belongs to the runs of its `model` (a label) that match its conditions `when`, such as
`quantizer=smoothquant quantizer.activations=token`. A run of one of the paper's experiments on another model
(`+experiment=paper_mixtral model=smol_moe`) is compared with the paper's figures too. These rows are marked as another
model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from haq_lab.measure.metrics import find_metric

FILE = Path(__file__).with_name("published.csv")
ANOTHER_MODEL = "no: another model"  # no difference is computed for it
COLUMNS = ["run", "metric", "ours", "published", "difference_percent", "of", "comparable", "source"]


def published() -> pd.DataFrame:
    """Return the content of `published.csv`.

    Returns:
        Columns `experiment`, `model`, `when`, `metric`, `value` (NaN if unknown), `setting` and `source`.
    """
    table = pd.read_csv(FILE, dtype={"value": float})
    return table.fillna({name: "" for name in table.columns if name != "value"})


def beside(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each measured metric that has a published figure.

    Args:
        runs: Table of runs from `haq_lab.results.load`.

    Returns:
        A table with the columns `COLUMNS`. `comparable` is `yes`, or it names what differs: the model, the protocol of
        a perplexity, or the machine.
    """
    known = published()
    rows: list[dict[str, Any]] = []
    for _, run in runs.iterrows():
        for _, figure in _figures_for(run, known).iterrows():
            ours, theirs = run.get(figure["metric"]), figure["value"]
            if ours is None or pd.isna(ours):
                continue
            row = {"run": run["name"], "metric": figure["metric"], "ours": ours, "published": theirs}
            row["comparable"] = _comparable(run, figure)
            row["difference_percent"] = None if row["comparable"] == ANOTHER_MODEL else (ours / theirs - 1) * 100
            row["of"] = ", ".join(filter(None, (figure["model"], figure["setting"])))
            rows.append(row | {"source": figure["source"]})
    return pd.DataFrame(rows, columns=COLUMNS)


def figures_of(row: pd.Series) -> list[str]:
    """Format the numbers of a row of `beside`: ours, the published one and the difference. Unknown ones are empty."""
    forms = {"ours": "{:,.4g}", "published": "{:,.4g}", "difference_percent": "{:+.2f} %"}
    return [form.format(row[name]) if pd.notna(row[name]) else "" for name, form in forms.items()]


def _figures_for(run: pd.Series, known: pd.DataFrame) -> pd.DataFrame:
    """Return the published rows of a run's model. If there are none, those of its experiment's first model."""
    fitting = known[[_holds(run, when) for when in known["when"]]]
    model = str(run.get("model")).lower()
    own = fitting["model"].str.lower() == model
    same_experiment = fitting["experiment"] == (run.get("experiment") or "none")
    if not own.any():
        models = known[(known["experiment"] == run.get("experiment")) & (known["model"] != "")]["model"]
        own = (fitting["model"] == models.iloc[0]) & same_experiment if len(models) else own
    return fitting[own | same_experiment & (fitting["model"] == "")]


def _holds(run: pd.Series, when: str) -> bool:
    """Return whether a run matches the conditions `when` of a published row."""
    conditions = [condition.partition("=") for condition in when.split()]
    return all(str(run.get(name, run.get(f"config.{name}"))) == value for name, _, value in conditions)


def _comparable(run: pd.Series, figure: pd.Series) -> str:
    """Return `yes`, or what prevents a comparison. Empty if the published figure is unknown."""
    if pd.isna(figure["value"]):
        return ""
    if figure["model"].lower() != str(run.get("model")).lower():
        return ANOTHER_MODEL
    metric, dataset = find_metric(figure["metric"]), figure["metric"].partition(".")[2]
    if metric is None or metric.depends_on == "machine":
        return "no: another machine"
    return "yes" if run.get(f"comparable.{dataset}") else "no: another protocol"
