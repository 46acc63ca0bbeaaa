"""What a run leaves in its folder beside the measurements: what the pass did, as metrics, tables, a figure, a trace."""

from __future__ import annotations

from typing import Any

import pandas as pd

from haq_lab.calibration import channel_ranges as ranges
from haq_lab.checkpoint import manifest as manifest_of
from haq_lab.config.build import Experiment
from haq_lab.quantizers.pass_result import PassResult
from haq_lab.results.figures import layer_figure
from haq_lab.tracking.run_folder import RunFolder
from haq_lab.utils.atomic_files import atomic_file


def write_record(
    experiment: Experiment,
    folder: RunFolder,
    facts: dict[str, Any],
    protocol: dict[str, Any],
    passed: PassResult,
    metrics: dict[str, float],
    tables: dict[str, pd.DataFrame],
) -> dict[str, Any]:
    """Write tables, figure and routing trace, `results.json`, which makes the run a finished one, and W&B's copy of it
    all; returns the content of `results.json`.

    Args:
        facts: About the run.
        protocol: Stamps of its texts.
        metrics: As measured; those of the pass are added.
        tables: Beside those of the pass.
    """
    metrics = metrics | pass_metrics(passed)
    tables = pass_tables(passed) | tables
    for name, table in tables.items():
        with atomic_file(folder.path / f"{name}.csv") as aside:
            table.to_csv(aside, index=False)
    figures = []
    if "layers" in tables:
        figures.append(layer_figure(tables["layers"], folder.path / "figures" / "layers.png"))
    if passed.routing is not None:
        trace = passed.routing.trace(experiment.model.label, experiment.calibration.text)
        trace.save(folder.path / "routing.safetensors")
    if passed.ranges.before:
        passed.ranges.save(folder.path / ranges.FILE)
    results = folder.finish(facts, protocol, metrics)
    if experiment.tracking is not None:
        manifest = None if experiment.checkpoint is None else experiment.checkpoint / manifest_of.FILE
        experiment.tracking.log(folder, folder.path.name, facts["sweep"], metrics, tables, figures, manifest)
    return results


def pass_metrics(passed: PassResult) -> dict[str, float]:
    """Seconds by stage, linears that fell back, and the share with dynamic activations."""
    metrics: dict[str, float] = {f"time.{stage}_s": seconds for stage, seconds in passed.stopwatch.seconds.items()}
    metrics["quantizer.fallback_modules"] = sum("fallback" in report.notes for report in passed.reports)
    if passed.reports:
        dynamic = sum(report.activation_scheme != "static" for report in passed.reports)
        metrics["quantizer.dynamic_share"] = dynamic / len(passed.reports)
    return metrics


def pass_tables(passed: PassResult) -> dict[str, pd.DataFrame]:
    """`layers`: what was done to each linear; `experts`: the tokens that each expert was calibrated on."""
    tables = {}
    if passed.reports:
        layers = pd.DataFrame([{**vars(report), **report.notes} for report in passed.reports])
        tables["layers"] = layers.drop(columns="notes")
    if passed.routing is not None:
        tables["experts"] = passed.routing.table()
    return tables
