"""Charts of what a model takes: latency distributions, and Pareto fronts of memory against perplexity or latency. Each
returns a `Chart`, or the reason why there is none."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from haq_lab.offload.plan import mark_pareto
from haq_lab.report.chart import Chart, axes, base, broken, coloured
from haq_lab.report.collect import Collection

MEMORY = "memory.weights_bytes"


def latency(found: Collection) -> Chart | str:
    """Every latency sample, a box a run and a variant a phase."""
    if "latency" not in found.tables:
        return "no run has kept latency samples (measure=[latency])"
    variants = {}
    for phase, table in found.tables["latency"].groupby("phase", sort=False):
        figure = base(120 + 52 * table["run"].nunique(), showlegend=False)
        for run, colour in coloured(list(table["run"].unique())).items():
            values = table.loc[table["run"] == run, "ms"]
            figure.add_box(
                x=values,
                y=[broken(run)] * len(values),
                name=run,
                orientation="h",
                boxpoints="outliers",
                marker={"color": colour, "size": 4},
                boxmean=True,
                hoverinfo="x+name",
            )
        figure.update_yaxes(autorange="reversed")
        variants[str(phase)] = axes(figure, "ms a token" if phase == "decode" else "ms", "")
    variants = dict(sorted(variants.items()))
    caption = (
        "Boxes: quartiles and median, dashed the mean; points beyond 1.5 times the quartiles' distance stand alone."
    )
    return Chart("Latency distributions", caption, variants)


def pareto(found: Collection) -> Chart | str:
    """Memory against each perplexity and latency, the front joined up; and simulated plans."""
    runs, variants = found.finished, {}
    costs = {
        name: f"{name.partition('.')[2]}, % over full precision"
        for name in map(str, runs)
        if name.startswith("change_percent.")
    }
    costs["latency.decode_ms_per_token.mean"] = "decode, ms a token"
    for name, label in costs.items():
        if MEMORY not in runs or name not in runs:
            continue
        points = runs.loc[runs[[MEMORY, name]].notna().all(axis=1), ["name", "model", MEMORY, name]]
        if len(points) > 1:
            points = points.rename(columns={MEMORY: "memory", name: "cost"}).assign(memory=points[MEMORY] / 1e6)
            variants[label] = _front(points, "model", "weights in memory, MB", label)
    for study, table in _plans(found):
        points = table.rename(columns={"simulated_ms": "cost"}).assign(memory=table["memory_bytes"] / 1e9)
        points["formats"] = points["host_format"] + " in RAM, " + points["device_format"] + " on the GPU"
        points["name"] = (
            points["placement"] + ", cache " + points["cache"] + ", " + points["slots"].astype(str) + " slots"
        )
        variants[f"simulated: {study}"] = _front(points, "formats", "GPU memory, GB", "simulated ms a token", log=True)
    if not variants:
        return "no two runs have measured memory and perplexity or latency (measure=[perplexity,memory,latency])"
    caption = "Down and to the left is better; on the line nothing else takes less of both."
    return Chart("Pareto fronts", caption, variants)


def _plans(found: Collection) -> list[tuple[str, pd.DataFrame]]:
    if "plan" not in found.studies:
        return []
    return [(str(study), table) for study, table in found.studies["plan"].groupby("study", sort=False)]


def _front(points: pd.DataFrame, group: str, x: str, y: str, log: bool = False) -> go.Figure:
    """Columns `memory`, `cost`, `name` and the group's, which gives the colours; one front for each model."""
    figure = base(430)
    own_fronts = group == "model"
    for label, colour in coloured(list(points[group].unique())).items():
        rows = points[points[group] == label]
        hover = f"%{{customdata}}<br>%{{x:,.4g}}: %{{y:.4g}}<extra>{label}</extra>"
        figure.add_scatter(
            x=rows["memory"],
            y=rows["cost"],
            customdata=rows["name"],
            name=str(label),
            mode="markers",
            marker={"color": colour, "size": 9, "opacity": 0.8},
            hovertemplate=hover,
        )
    for _, rows in points.groupby(group, sort=False) if own_fronts else [("", points)]:
        front = mark_pareto(rows, "memory", "cost").query("pareto").sort_values("memory")
        figure.add_scatter(
            x=front["memory"],
            y=front["cost"],
            mode="lines",
            line={"color": "#8a8f98", "width": 1.5},
            showlegend=False,
            hoverinfo="skip",
        )
    axes(figure, x, y)
    figure.update_yaxes(type="log" if log else "linear")
    return figure
