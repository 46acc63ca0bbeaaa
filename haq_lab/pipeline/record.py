"""Write the record of a run: metrics, tables, a figure, a routing trace, `results.json` and the trackers' copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from haq_lab.calibration import channel_ranges as ranges
from haq_lab.checkpoint import manifest
from haq_lab.config.build import Experiment
from haq_lab.quantizers.pass_result import PassResult
from haq_lab.tracking.run_folder import RunFolder
from haq_lab.tracking.tracker import RunRecord, track_run
from haq_lab.utils.atomic_files import atomic_file
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError
from haq_lab.utils.extras import need


def write_record(
    experiment: Experiment,
    folder: RunFolder,
    facts: dict[str, Any],
    protocol: dict[str, Any],
    passed: PassResult,
    metrics: dict[str, float],
    tables: dict[str, pd.DataFrame],
) -> dict[str, Any]:
    """Write all files of a finished run, and send a copy to its trackers.

    `results.json` is written after the other files, because it marks the run as finished.

    Args:
        experiment: The objects of the run.
        folder: The run folder.
        facts: Description of the run and the machine, the part `run` of `results.json`.
        protocol: Description of the texts and their windows, by dataset.
        passed: Result of the sequential pass.
        metrics: Measured metrics. Those of the pass are added.
        tables: Measured tables. Those of the pass are added.

    Returns:
        The content of `results.json`.
    """
    metrics = metrics | pass_metrics(passed)
    tables = pass_tables(passed) | tables
    for name, table in tables.items():
        with atomic_file(folder.path / f"{name}.csv") as path:
            table.to_csv(path, index=False)
    figures = _draw(tables, folder)
    if passed.routing is not None:
        trace = passed.routing.trace(experiment.model.label, experiment.calibration.text)
        trace.save(folder.path / "routing.safetensors")
    if passed.ranges.before:
        passed.ranges.save(folder.path / ranges.FILE)
    results = folder.finish(facts, protocol, metrics)
    artifacts = {} if experiment.checkpoint is None else {experiment.checkpoint / manifest.FILE: "checkpoint"}
    finite = {name: value for name, value in metrics.items() if name not in results.get("not_finite", {})}
    record = RunRecord(folder.path.name, facts["sweep"], finite, tables, figures, artifacts)
    track_run(experiment.trackers, folder, record, experiment.private)
    return results


def _draw(tables: dict[str, pd.DataFrame], folder: RunFolder) -> list[Path]:
    """Draw the figures of a run, and return their files. Without matplotlib, say what would draw them."""
    if "layers" not in tables:
        return []
    try:
        need("figures/layers.png", "report", "matplotlib")
    except UserError as missing:
        say(str(missing))
        return []
    from haq_lab.results.figures import layer_figure

    return [layer_figure(tables["layers"], folder.path / "figures" / "layers.png")]


def pass_metrics(passed: PassResult) -> dict[str, float]:
    """Return the metrics of a pass.

    Returns:
        Seconds of each stage, the number of linears with a fallback, and the share of linears whose activations are
        quantised dynamically. If there are 4-bit weights: their share of the linears' weights, and the mean bits of a
        weight without scales.
    """
    metrics: dict[str, float] = {f"time.{stage}_s": seconds for stage, seconds in passed.stopwatch.seconds.items()}
    metrics["quantizer.fallback_modules"] = sum("fallback" in report.notes for report in passed.reports)
    if passed.reports:
        dynamic = sum(report.activation_scheme != "static" for report in passed.reports)
        metrics["quantizer.dynamic_share"] = dynamic / len(passed.reports)
    if narrow := sum(report.weights for report in passed.reports if report.weight_bits == 4):
        weights = sum(report.weights for report in passed.reports)
        metrics["quantizer.share_4bit"] = narrow / weights
        metrics["quantizer.bits_per_weight"] = sum(one.weights * one.weight_bits for one in passed.reports) / weights
    return metrics


def pass_tables(passed: PassResult) -> dict[str, pd.DataFrame]:
    """Return the tables of a pass.

    Returns:
        `layers` has a row for each quantised linear. `experts` has the number of calibration tokens of each expert.
    """
    tables = {}
    if passed.reports:
        layers = pd.DataFrame([{**vars(report), **report.notes} for report in passed.reports])
        tables["layers"] = layers.drop(columns="notes")
    if passed.routing is not None:
        tables["experts"] = passed.routing.table()
    return tables
