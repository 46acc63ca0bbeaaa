"""Draw the popularity of experts, and hit rates by budget.

Each function returns a `Chart`, or the reason why there is none.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from haq_lab.report.chart import GREY, HEAT, Chart, axes, looks, styled, whole_numbers
from haq_lab.report.collect import Collection

HIT_RATE = "offload.hit_rate_pairs"
CHOICES = ("quantizer", "backend", "hardware", "calibration", "prompts")  # columns that distinguish runs of one policy
WITHOUT_EFFECT = (  # settings that do not change a hit rate
    "config.offload.budget",
    "config.checkpoint.",
    "config.result_cache.",
    "config.hardware.",
    "config.force",
)


def popularity(collection: Collection) -> Chart | str:
    """Draw a heat map of each expert's share of the layer's routing decisions, one variant for each run."""
    if "experts" not in collection.tables:
        return "No run with calibration has a model with experts (experts.csv)."
    variants, seen = {}, set()
    for run, table in collection.tables["experts"].groupby("run", sort=False):
        share = table.pivot(index="layer", columns="expert", values="share")
        if (key := share.round(6).to_numpy().tobytes()) in seen:  # the same model on the same text
            continue
        seen.add(key)
        figure = styled(go.Figure(), 140 + max(14 * len(share), 120))
        hover = "layer %{y}, expert %{x}<br>%{z:.2%} of the choices<extra></extra>"
        bar = {"tickformat": ".0%", "thickness": 12}
        figure.add_heatmap(
            z=share.to_numpy(np.float32),
            x=share.columns,
            y=share.index,
            colorscale=HEAT,
            zmin=0,
            colorbar=bar,
            hovertemplate=hover,
        )
        figure.update_yaxes(**whole_numbers(len(share)))
        variants[str(run)] = axes(figure, "expert", "layer")
    return Chart(
        "Expert popularity", "Routing of the calibration text. Runs with the same routing are shown once.", variants
    )


def hit_rates(collection: Collection) -> Chart | str:
    """Draw hit rates by budget: replays of traces under each policy with Belady's bound, and those measured in runs."""
    variants = {f"replay: {study}": _curves(table) for study, table in collection.by_study("hit_rates")}
    for model, runs in collection.by_model():
        if not (measured := _measured(runs, collection.tables.get("experts"))).empty:
            variants[f"measured in runs: {model}"] = _curves(measured)
    if not variants:
        return "No replay (python -m haq_lab.offload replay ... --out DIR) and no run with offload=OPTION."
    caption = (
        "Share of the (token, expert) pairs whose expert is resident. Belady's bound knows the future, so no policy "
        "can exceed it. Replays are exact for their recorded trace."
    )
    return Chart("Hit rate by budget", caption, variants)


def _measured(runs: pd.DataFrame, experts: pd.DataFrame | None) -> pd.DataFrame:
    """Return the hit rates of runs by policy and share of resident experts. Runs with equal settings are averaged."""
    if HIT_RATE not in runs:
        return pd.DataFrame()
    runs = runs[runs[HIT_RATE].notna()]
    share = _resident_share(runs, experts)
    runs, share = runs[share.notna()], share.dropna()
    rates = pd.DataFrame({"policy": _line_names(runs), "budget": share, "pairs": runs[HIT_RATE]})
    return rates.groupby(["policy", "budget"], as_index=False).mean()


def _line_names(runs: pd.DataFrame) -> pd.Series:
    """Return the policy of each run, with the settings in which the policy's runs differ, except for the budget."""
    names = runs["offload"].astype(str)
    settings = [
        *(name for name in CHOICES if name in runs),
        *(name for name in map(str, runs) if name.startswith("config.") and not name.startswith(WITHOUT_EFFECT)),
    ]
    for _, group in runs.groupby("offload", sort=False):
        for setting in settings:
            values = group[setting].dropna().astype(str)
            if values.nunique() > 1:
                names[values.index] += f", {setting.removeprefix('config.')}=" + values
    return names


def _resident_share(runs: pd.DataFrame, experts: pd.DataFrame | None) -> pd.Series:
    """Return the share of resident experts: the budget in percent, otherwise the slots divided by the experts.

    The number of experts is the number of rows in `experts.csv`, or it follows from a run of the same model with a
    budget in percent.
    """
    budget = runs["config.offload.budget"].astype(str)
    percent = pd.to_numeric(budget.where(budget.str.endswith("%")).str.rstrip("%"), errors="coerce") / 100
    slots = runs["offload.slots"] if "offload.slots" in runs else pd.Series(np.nan, runs.index)
    counted = runs["name"].map({} if experts is None else experts.groupby("run").size()).astype(float)
    total = counted.fillna((slots / percent).max())
    return percent.fillna(slots / total)


def _curves(table: pd.DataFrame) -> go.Figure:
    """Draw the hit rate `pairs` over `budget`, one line for each `policy`."""
    figure = styled(go.Figure(), 430)
    policies = [name for name in table["policy"].unique() if not name.startswith("Belady")]
    own = looks(sorted(policies, key=lambda name: not _is_haq(name)))
    for policy, rows in table.groupby("policy", sort=False):
        name = str(policy)
        bound = name.startswith("Belady")
        line = {"color": GREY, "dash": "dash"} if bound else {"color": own[name].colour, "dash": own[name].dash}
        width = 3.5 if _is_haq(name) else 1.6
        figure.add_scatter(
            x=rows["budget"],
            y=rows["pairs"],
            name=name,
            mode="lines+markers",
            line=line | {"width": width},
            hovertemplate=f"{name}<br>%{{x:.1%}} resident: %{{y:.2%}}<extra></extra>",
        )
    axes(figure, "experts resident", "hit rate")
    figure.update_xaxes(tickformat=".0%", range=[0, 1.02])
    figure.update_yaxes(tickformat=".0%")
    return figure


def _is_haq(line: str) -> bool:
    return line.partition(",")[0].lower() == "haq"
