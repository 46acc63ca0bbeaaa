"""Render the page: `page.html` with tables, charts and plotly's script."""

from __future__ import annotations

import base64
import gzip
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from plotly.offline import get_plotlyjs

from haq_lab.report import cost, provenance, quality, routing, tables
from haq_lab.report.chart import Chart
from haq_lab.report.collect import Collection
from haq_lab.results.run_labels import CHECKPOINT, FULL_PRECISION

TEMPLATE = Path(__file__).with_name("page.html")
CHARTS: dict[str, Callable[[Collection], Chart | str]] = {
    "Perplexity by method": quality.perplexity,
    "KL divergence by method": quality.divergence,
    "Pareto fronts": cost.pareto,
    "Error and strength by layer": quality.layers,
    "Outliers before and after smoothing": quality.outliers,
    "Latency distributions": cost.latency,
    "Expert popularity": routing.popularity,
    "Hit rate by budget": routing.hit_rates,
}


def page(collection: Collection, title: str) -> str:
    """Return the whole page as HTML. It loads nothing from the network.

    Args:
        collection: All data of the report.
        title: Title of the page.
    """
    drawn = {name: chart(collection) for name, chart in CHARTS.items()}
    charts = [_embedded(chart) for chart in drawn.values() if isinstance(chart, Chart)]
    missing = [(name, reason) for name, reason in drawn.items() if isinstance(reason, str)]
    failures = collection.runs[collection.runs["status"] != "finished"]
    failed_runs = [
        {
            **run[["name", "status", "folder"]],
            "error": run["error"] if run["status"] == "failed" else "It was killed, or it is still running.",
        }
        for _, run in failures.iterrows()
    ]
    published = tables.published_table(collection)
    anchors = (
        "failures" * bool(failed_runs),
        "results",
        "published" * bool(published),
        "figures",
        "runs",
        "protocol",
        "provenance",
    )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        version=version("haq-lab"),
        made=time.strftime("%Y-%m-%d %H:%M"),
        summary=_summary(collection),
        sections=[(anchor, anchor.capitalize()) for anchor in anchors if anchor],
        failures=failed_runs,
        results=tables.result_tables(collection),
        published=published,
        charts=charts,
        missing=missing,
        reading=tables.NOTE,
        runs=provenance.run_table(collection),
        protocol=provenance.protocol_table(collection),
        provenance=provenance.provenance_table(collection),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9)).decode() if charts else "",
    )


def _embedded(chart: Chart) -> dict[str, Any]:
    """Return a chart for the template. Its variants are JSON that is valid inside a script element."""
    figures = ",".join(f"{json.dumps(name)}:{figure.to_json()}" for name, figure in chart.variants.items())
    content = ("{" + figures + "}").replace("<", "\\u003c")
    return {"title": chart.title, "caption": chart.caption, "variants": list(chart.variants), "json": content}


def _summary(collection: Collection) -> list[tuple[Any, str]]:
    """Return the numbers and names at the top of the page, each with its label."""
    counts = collection.runs["status"].value_counts().to_dict()
    summary: list[tuple[Any, str]] = [(counts.get("finished", 0), "runs finished")]
    summary += [(counts[status], status) for status in ("failed", "unfinished") if status in counts]
    finished = collection.finished
    methods = [name for name in finished.get("method", []) if name not in (FULL_PRECISION, CHECKPOINT)]
    offload = [str(name) for name in finished.get("offload", []) if pd.notna(name) and name != "none"]
    for found, one, many in (
        (filter(None, collection.runs.get("model", [])), "model", "models"),
        (methods, "method", "methods"),
        (offload, "offload policy", "offload policies"),
    ):
        if names := list(dict.fromkeys(found)):
            summary.append((", ".join(names), many if len(names) > 1 else one))
    return summary
