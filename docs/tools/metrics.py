"""The table of all metrics, from `haq_lab.measure.metrics.METRICS`."""

from __future__ import annotations

from docs.tools.tables import code, table
from haq_lab.measure.metrics import METRICS, UNQUANTISED, Metric

SHOWN = {"all": "all tables", "report": "report", "none": "table of one run"}


def metrics() -> str:
    """Return the table, one row a pattern of names."""
    rows = [
        (
            code(name),
            metric.label.replace("{}", "…"),
            _unit(metric),
            metric.direction,
            {"": "", UNQUANTISED: "the unquantised run"}.get(metric.baseline, code(metric.baseline)),
            SHOWN[metric.column],
        )
        for name, metric in METRICS.items()
    ]
    return table(("name", "label", "shown in", "better", "compared in % with", "where"), rows)


def _unit(metric: Metric) -> str:
    """Return the unit of the tables, and what is recorded if that is another."""
    if metric.factor == 1:
        return metric.unit
    recorded = {100: "recorded as a share", 1e-6: "recorded in bytes"}
    return f"{metric.unit}, {recorded.get(metric.factor, f'recorded value times {metric.factor:g}')}"
