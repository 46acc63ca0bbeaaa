"""Print the metrics of one finished run to the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.table import Column, Table

from haq_lab.measure.disturbance import advice, mark
from haq_lab.measure.metrics import Metric, find_metric
from haq_lab.utils.console import format_change, print_table, say

ERRORS = (".stderr", ".low", ".high")  # ends of the names of metrics that are shown beside another
OWN_METRICS = TypeAdapter(dict[str, Metric])


def show_results(results: dict[str, Any], folder: Path) -> None:
    """Print a table of the metrics of a finished run, its prefix and its limitation if it has any, and its folder.

    Args:
        results: Content of the run's `results.json`.
        folder: The run's folder.
    """
    metrics, run = results["metrics"], results["run"]
    declared = OWN_METRICS.validate_python(run.get("own_metrics", {}))
    scheme = results.get("config", {}).get("quantizer", {}).get("activations")
    title = f"{run['model']}  {', '.join(filter(None, (run['quantizer'], scheme)))}"
    table = Table(Column("metric", overflow="fold"), "value", title=title, title_justify="left")
    for name, value in metrics.items():
        if name.startswith("time.") or name.endswith(ERRORS):
            continue
        if value is None:
            table.add_row(name, f"null ({results.get('not_finite', {}).get(name, 'not finite')})")
            continue
        note = ""
        dataset = name.partition(".")[2]
        if name.startswith("perplexity.") and (fp := metrics.get(f"perplexity_fp.{dataset}")):
            note = f"  ({format_change(value, fp, metrics.get(f'dlnppl.{dataset}.stderr'))})"
        elif (error := metrics.get(f"{name}.stderr")) is not None:
            note = f"  (± {format_metric(name, error, declared)})"
        table.add_row(name, mark(name, metrics) + format_metric(name, value, declared) + note)
    print_table(table)
    if sentence := advice(metrics):
        say(sentence)
    for line in ("prefix", "offload_limitation"):
        if line in run:
            say(run[line])
    say(f"run folder: {folder}")


def format_metric(name: str, value: float, declared: Mapping[str, Metric] | None = None) -> str:
    """Format a metric's value with its unit.

    Args:
        name: Full name of the metric. `simulated.MACHINE.NAME` has the unit of the metric NAME.
        value: Recorded value.
        declared: Metrics of the user's own measures, in the form of `METRICS`.
    """
    measured = name.split(".", 2)[2] if name.startswith("simulated.") and name.count(".") > 1 else name
    metric = find_metric(measured, declared)
    if metric is None:
        return f"{value:,.5g}"
    return f"{metric.format(value)} {metric.unit}".rstrip()
