"""Draw the figures of the offloading studies."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from haq_lab.routing.statistics import frequencies
from haq_lab.routing.trace import Trace
from haq_lab.utils.plotting import save


def curve_figure(table: pd.DataFrame, title: str, path: Path) -> Path:
    """Draw the hit rate over the budget, one line a policy. Belady's bound is dashed."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for policy, rows in table.groupby("policy", sort=False):
        bound = str(policy).startswith("Belady")
        style = {"color": "black", "linestyle": "--"} if bound else {"linewidth": 2.5 if policy == "HAQ" else 1}
        axes.plot(100 * rows["budget"], rows["pairs"], marker=".", label=policy, **style)
    axes.set(xlabel="experts resident, %", ylabel="hit rate, share of (token, expert) pairs", title=title)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return save(figure, path)


def heat_figure(trace: Trace, path: Path) -> Path:
    """Draw how often each expert is chosen. Rows are layers, columns are experts."""
    usage = frequencies(trace)
    figure = Figure(figsize=(2 + 0.5 * usage.shape[1], 1.5 + 0.2 * len(usage)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(usage, aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="expert", ylabel="layer", title="Share of tokens that choose an expert")
    figure.colorbar(image, ax=axes)
    return save(figure, path)


def pareto_figure(table: pd.DataFrame, hardware: str, path: Path) -> Path:
    """Draw simulated latency over GPU memory, with a line along the Pareto front."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for (host, device), rows in table.groupby(["host_format", "device_format"]):
        label = f"{host} in RAM, {device} on the GPU"
        axes.scatter(rows["memory_bytes"] / 1e9, rows["simulated_ms"], s=14, label=label)
    front = table[table["pareto"]].sort_values("memory_bytes")
    axes.plot(front["memory_bytes"] / 1e9, front["simulated_ms"], color="black", linewidth=1, label="Pareto front")
    axes.set(xlabel="GPU memory, GB", ylabel="simulated ms a token", yscale="log", title=f"Simulated: {hardware}")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return save(figure, path)
