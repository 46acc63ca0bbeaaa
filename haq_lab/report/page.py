"""The page itself: tables and charts put into `page.html`, with plotly's own script packed inside."""

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

from haq_lab.report import cost, quality, routing, tables
from haq_lab.report.chart import Chart
from haq_lab.report.collect import Collection

TEMPLATE = Path(__file__).with_name("page.html")
CHARTS: dict[str, Callable[[Collection], Chart | str]] = {
    "Perplexity by method": quality.perplexity,
    "Pareto fronts": cost.pareto,
    "Error and strength by layer": quality.layers,
    "Outliers before and after smoothing": quality.outliers,
    "Latency distributions": cost.latency,
    "Expert popularity": routing.popularity,
    "Hit rate by budget": routing.hit_rates,
}


def page(found: Collection, title: str) -> str:
    """The whole page as HTML; it asks for nothing from anywhere."""
    drawn = {name: chart(found) for name, chart in CHARTS.items()}
    charts = [_embedded(chart) for chart in drawn.values() if isinstance(chart, Chart)]
    missing = [(name, reason) for name, reason in drawn.items() if isinstance(reason, str)]
    failures = found.runs[found.runs["status"] != "finished"]
    told = [
        {
            **run[["name", "status", "folder"]],
            "error": run["error"] if run["status"] == "failed" else "It was killed, or is still running.",
        }
        for _, run in failures.iterrows()
    ]
    published = tables.published_table(found)
    anchors = (
        "failures" * bool(told),
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
        facts=_facts(found),
        sections=[(anchor, anchor.capitalize()) for anchor in anchors if anchor],
        failures=told,
        results=tables.result_tables(found),
        published=published,
        charts=charts,
        missing=missing,
        runs=tables.run_table(found),
        protocol=tables.protocol_table(found),
        provenance=tables.provenance_table(found),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9)).decode() if charts else "",
    )


def _embedded(chart: Chart) -> dict[str, Any]:
    """A chart for the template: its variants as JSON that may stand within a script element."""
    figures = ",".join(f"{json.dumps(name)}:{figure.to_json()}" for name, figure in chart.variants.items())
    content = ("{" + figures + "}").replace("<", "\\u003c")
    return {"title": chart.title, "caption": chart.caption, "variants": list(chart.variants), "json": content}


def _facts(found: Collection) -> list[tuple[Any, str]]:
    counts = found.runs["status"].value_counts().to_dict()
    facts: list[tuple[Any, str]] = [(counts.get("finished", 0), "runs finished")]
    facts += [(counts[status], status) for status in ("failed", "unfinished") if status in counts]
    for column, one, many in (
        ("model", "model", "models"),
        ("quantizer", "quantizer", "quantizers"),
        ("offload", "offload policy", "offload policies"),
    ):
        names = [str(name) for name in found.runs.get(column, []) if pd.notna(name) and name not in ("", "none")]
        if names := list(dict.fromkeys(names)):
            facts.append((", ".join(names), many if len(names) > 1 else one))
    return facts
