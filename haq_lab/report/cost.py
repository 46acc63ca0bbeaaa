"""Draw latency distributions, and Pareto fronts of memory against perplexity or latency.

Each function returns a `Chart`, or the reason why there is none.
"""

from __future__ import annotations

from itertools import cycle, product

import pandas as pd
import plotly.graph_objects as go

from haq_lab.offload.simulate.capacity_plan import mark_pareto
from haq_lab.report.chart import COLOURS, GREY, Chart, Scale, axes, bar_height, looks, styled, wrapped
from haq_lab.report.collect import Collection

MEMORY = "memory.weights_bytes"


def latency(collection: Collection) -> Chart | str:
    """Draw the latency samples: one box for each run, one variant for each model and phase."""
    if "latency" not in collection.tables:
        return "No run has latency samples (measure=[latency])."
    samples, variants = collection.tables["latency"], {}
    for (model, runs), phase in product(collection.by_model(), ("decode", "prefill")):
        own = runs[runs["name"].isin(samples["run"])]
        if own.empty:
            continue
        figure = styled(go.Figure(), 100 + bar_height(own["label"]), showlegend=False)
        for (_, run), colour in zip(own.iterrows(), cycle(COLOURS), strict=False):
            values = samples.loc[(samples["run"] == run["name"]) & (samples["phase"] == phase), "ms"]
            box = {"orientation": "h", "boxpoints": "outliers", "boxmean": True, "hoverinfo": "x+name"}
            marker = {"color": colour, "size": 4}
            figure.add_box(x=values, y=[wrapped(run["label"])] * len(values), name=run["label"], marker=marker, **box)
        figure.update_yaxes(autorange="reversed", type="category")  # a name such as 5GB is not a number
        variants[f"{model}, {phase}"] = axes(figure, "ms per token" if phase == "decode" else "ms", "")
    caption = (
        "Boxes show the quartiles and the median, dashed lines the mean. Samples farther than 1.5 times the "
        "interquartile range are single points."
    )
    return Chart("Latency distributions", caption, variants)


def pareto(collection: Collection) -> Chart | str:
    """Draw memory against each perplexity and latency, and simulated plans, each with its Pareto front."""
    variants = {}
    changes = [name for name in map(str, collection.shown) if name.startswith("change_percent.")]
    costs = {name: f"{name.partition('.')[2]}: perplexity over fp, %" for name in changes}
    costs["latency.decode_ms_per_token.mean"] = "decode, ms per token"
    for (model, runs), (name, label) in product(collection.by_model(), costs.items()):
        if MEMORY not in runs or name not in runs:
            continue
        points = runs[runs[[MEMORY, name]].notna().all(axis=1)]
        if len(points) > 1:
            points = points.assign(memory=points[MEMORY] / 1e6, cost=points[name], method=_methods(points))
            variants[f"{model}: {label}"] = _front(points, "method", "weights in memory, MB", label)
    for study, table in collection.by_study("plan"):
        points = table.rename(columns={"simulated_ms": "cost"}).assign(memory=table["memory_bytes"] / 1e9)
        points["formats"] = points["host_format"] + " in RAM, " + points["device_format"] + " on the GPU"
        points["label"] = (
            points["placement"] + ", cache " + points["cache"] + ", " + points["slots"].astype(str) + " slots"
        )
        variants[f"simulated: {study}"] = _front(
            points, "formats", "GPU memory, GB", "simulated ms per token", log=True
        )
    if not variants:
        return "Fewer than two runs have memory and perplexity or latency (measure=[perplexity,memory,latency])."
    caption = "Lower and farther left is better. The line is the Pareto front: no other point is better in both."
    return Chart("Pareto fronts", caption, variants)


def _methods(runs: pd.DataFrame) -> pd.Series:
    """Return the method of each run, which decides its colour: quantizer, and offloading policy if these differ."""
    offload = runs["offload"].fillna("none")
    return runs["method"] if offload.nunique() == 1 else runs["method"] + ", " + offload


def _front(points: pd.DataFrame, group: str, x: str, y: str, log: bool = False) -> go.Figure:
    """Draw points and their Pareto front.

    Args:
        points: Columns `memory`, `cost`, `label`, and the column `group`.
        group: Column that decides the colours.
        x: Title of the axis of memory.
        y: Title of the axis of costs.
        log: Whether the axis of costs is logarithmic. Otherwise it is so if one cost would hide the others.
    """
    figure = styled(go.Figure(), 430)
    scale = Scale((), False) if log else Scale.of(points["cost"])
    points = points.assign(place=scale.place(points["cost"]))
    for name, look in looks(list(points[group].unique())).items():
        rows = points[points[group] == name]
        figure.add_scatter(
            x=rows["memory"],
            y=rows["place"],
            customdata=rows[["label", "cost"]],
            name=str(name),
            mode="markers",
            marker={"color": look.colour, "symbol": look.symbol, "size": 10, "opacity": 0.85},
            hovertemplate="%{customdata[0]}<br>%{x:,.4g}: %{customdata[1]:.4g}<extra></extra>",
        )
    front = mark_pareto(points, "memory", "cost").query("pareto").sort_values("memory")
    line = {"color": GREY, "width": 1.5}
    figure.add_scatter(x=front["memory"], y=front["place"], mode="lines", line=line, showlegend=False, hoverinfo="skip")
    axes(figure, x, y)
    figure.update_xaxes(rangemode="nonnegative")  # with a single point, the axis would begin below 0
    figure.update_yaxes(type="log" if log else "linear", **scale.axis())
    return figure
