"""Load all runs below some folders as one table, and print it."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from haq_lab.measure.disturbance import advice, mark
from haq_lab.measure.metrics import Metric, find_metric, table_columns
from haq_lab.results.model_names import distinct_names
from haq_lab.results.old_names import SETTINGS
from haq_lab.results.published import figures_of
from haq_lab.results.read_record import read_record
from haq_lab.tracking.run_folder import ARCHIVE
from haq_lab.tracking.tracker import flat_settings
from haq_lab.utils.console import format_percent, print_table, say
from haq_lab.utils.errors import UserError, nearest_beside

RANDOM_PROMPTS = "random"  # text of the stamp `protocol.latency` if the prompts are random token ids
NOT_EVALUATED = ("calibration", "latency", "memory")  # stamps of texts on which no perplexity is measured
MILLISECONDS = {  # ratios to the full-precision model, and the times that they replace in the table
    "latency.speed_vs_fp.prefill": "latency.prefill_ms",
    "latency.speed_vs_fp.decode": "latency.decode_ms_per_token.mean",
}
RECORDS = ("results.json", "error.json", "config.yaml")


def load(*folders: str | Path) -> pd.DataFrame:
    """Return all runs below some folders as a table with one row for each run, in the order of their start.

    Args:
        folders: Folders of runs or of sweeps. Failed and unfinished runs are included, archived ones are not.

    Returns:
        A table with these columns:

        - `folder`, `name` (unique within the table if possible), `status` (finished, failed or unfinished), `error`
        - the choices (`model`, `quantizer`, ...), and whether the model is `quantized`
        - `config.<name>`: the settings
        - the metrics by their names
        - `change_percent.<dataset>`: change of the perplexity from full precision, in %
        - `change_percent_stderr.<dataset>`: its standard error, paired over the windows
        - `comparable.<dataset>`: the published tables that the perplexity is comparable with
        - `null.<metric>`: the reason why a metric is null
        - `saved_percent.memory`: size of the weights below that of the whole model in fp16, in %
        - `prompts`: the text of the prompts for latency and expert metrics (`random`: random token ids)

        Its `attrs["own_metrics"]` has the metrics that the users' own measures declare.

    Raises:
        UserError: A folder does not exist.

    Example:
        >>> runs = load("runs")
        >>> runs[["name", "perplexity.wikitext2"]]
    """
    run_folders: dict[Path, Path] = {}  # by the resolved path, so that no run is listed twice
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"there is no folder '{folder}'{nearest_beside(folder) or '. Name an existing one.'}")
        run_folders |= {run.resolve(): run for run in sorted(_run_folders(folder))}
    rows = sorted(map(_row, run_folders.values()), key=lambda row: _start_time(row.get("started")))
    known = [row for row in rows if row.get("model")]
    for row, model in zip(known, distinct_names([(row["model"], row.pop("_model")) for row in known]), strict=True):
        row["model"] = model
    for row, name in zip(rows, short_names(rows), strict=True):
        row["name"] = name
    own_metrics = {name: metric for row in rows for name, metric in row.pop("_own_metrics").items()}
    runs = pd.DataFrame(rows, columns=None if rows else ["folder", "name", "status", "error"])
    runs.attrs["own_metrics"] = own_metrics
    if {"memory.weights_bytes", "memory.weights_fp16_bytes"} <= set(runs):
        runs["saved_percent.memory"] = (1 - runs["memory.weights_bytes"] / runs["memory.weights_fp16_bytes"]) * 100
    return runs


def short_names(rows: list[dict[str, Any]]) -> list[str]:
    """Return a name for each run: the overrides that differ between the runs of sweeps, otherwise the folder's name.

    Args:
        rows: Rows of `load`.
    """
    overrides = [row["overrides"].split() if row.get("sweep") else [] for row in rows]
    shared = set.intersection(*map(set, filter(None, overrides))) if any(overrides) else set()
    names = [" ".join(override for override in own if override not in shared) for own in overrides]
    return [name if name and names.count(name) == 1 else row["name"] for name, row in zip(names, rows, strict=True)]


def evaluated_texts(protocol: dict[str, Any]) -> list[str]:
    """Return the names of the texts in a run's protocol on which the model was evaluated."""
    return [text for text in protocol if text not in NOT_EVALUATED]


def _run_folders(folder: Path) -> set[Path]:
    """Return the folders of runs at any depth, without archived runs."""
    folders = {path.parent for name in RECORDS for path in folder.rglob(name)}
    return {path for path in folders if not {ARCHIVE, "wandb"} & set(path.relative_to(folder).parts)}


def _row(folder: Path) -> dict[str, Any]:
    """Return the row of a run."""
    results, failure = read_record(folder / "results.json"), read_record(folder / "error.json")
    record = results or failure or {}
    status = "finished" if results else "failed" if failure else "unfinished"
    own = {"folder": str(folder), "name": folder.name, "status": status}
    row: dict[str, Any] = dict(own)
    row["overrides"] = " ".join(record.get("run", {}).get("overrides", []))
    row["error"] = (failure or {}).get("error", {}).get("message") if not results else None
    row |= {name: value for name, value in record.get("run", {}).items() if not isinstance(value, list | dict)}
    row |= {
        f"config.{SETTINGS.get(name, name)}": value for name, value in flat_settings(record.get("config", {})).items()
    }
    row["quantized"] = _is_quantized(row)
    if row.get("model"):
        row["_model"] = record.get("config", {}).get("model") or {}
    row["_own_metrics"] = record.get("run", {}).get("own_metrics", {})
    metrics = {name: math.nan if value is None else value for name, value in record.get("metrics", {}).items()}
    reasons = record.get("not_finite", {})
    nulls = {name: reasons.get(name, "not finite") for name, value in metrics.items() if math.isnan(value)}
    row |= metrics | {f"null.{name}": reason for name, reason in nulls.items()} | own
    for name, value in metrics.items():
        kind, _, dataset = name.partition(".")
        if kind == "perplexity" and (fp := metrics.get(f"perplexity_fp.{dataset}")):
            row[f"change_percent.{dataset}"] = (value / fp - 1) * 100
            if (error := metrics.get(f"dlnppl.{dataset}.stderr")) is not None:
                row[f"change_percent_stderr.{dataset}"] = value / fp * error * 100
    protocol = record.get("protocol", {})
    for text in evaluated_texts(protocol):
        row[f"comparable.{text}"] = "; ".join(protocol[text].get("comparable_with", []))
    if "text" in (prompts := protocol.get("latency", {})):
        row["prompts"] = prompts["text"]
    return row


def _start_time(started: Any) -> datetime:
    """Return when a run started. A run without a time comes last."""
    try:
        time = datetime.fromisoformat(str(started))
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _is_quantized(row: dict[str, Any]) -> bool:
    """Return whether a run's model was quantised, by the run itself or before it (`model=quantized`)."""
    chosen = row.get("quantizer") or "none"
    return chosen != "none" or str(row.get("config.model._target_", "")).endswith(".QuantizedCheckpoint")


def show(runs: pd.DataFrame) -> None:
    """Print a table of runs: their names, perplexities and other metrics.

    Args:
        runs: Table of runs from `load`.
    """
    datasets = [column.partition(".")[2] for column in map(str, runs) if column.startswith("change_percent.")]
    all_finished = bool((runs["status"] == "finished").all())
    table = Table()
    table.add_column("run", overflow="fold", min_width=10)
    if not all_finished:
        table.add_column("status", min_width=10)
    for dataset in datasets:
        table.add_column(f"{dataset}\nppl", justify="right", no_wrap=True)
        table.add_column("over\nfp", justify="right", no_wrap=True)
    names = [name for name in map(str, runs) if not name.startswith("perplexity.")]
    columns = table_columns(names, runs.attrs.get("own_metrics"))
    hidden = _replaced_by_ratios(runs)
    measured = {
        name: metric
        for name, metric in columns.items()
        if (metric.column == "all" or not find_metric(name)) and name not in hidden
    }
    for metric in measured.values():
        table.add_column(metric.head.replace(", ", "\n"), justify="right", no_wrap=True)
    for _, run in runs.iterrows():
        cells = [run["name"]] if all_finished else [run["name"], run["status"]]
        for dataset in datasets:
            null = isinstance(run.get(f"null.perplexity.{dataset}"), str)
            cells.append("null" if null else _cell(run.get(f"perplexity.{dataset}"), "{:.4f}"))
            cells.append(_change(run, dataset))
        cells += [_measured(run, name, metric) for name, metric in measured.items()]
        table.add_row(*cells)
    print_table(table)
    printed: set[str] = set()
    for _, run in runs.iterrows():
        say(f"{run['name']}: {run['folder']}")
        if run["status"] == "failed":
            say(f"    failed: {'the same message as above' if run['error'] in printed else run['error']}")
            printed.add(run["error"])
        for line in ("prefix", "offload_limitation"):
            if not pd.isna(text := run.get(line)):
                say(f"    {text}")
        if sentence := "" if all(name in hidden for name in MILLISECONDS.values()) else advice(run):
            say(f"    {sentence}")
        if run.get("prompts") == RANDOM_PROMPTS:
            say("    Latency and expert metrics were measured with random prompts.")


def show_published(figures: pd.DataFrame) -> None:
    """Print published figures beside ours, if there are any.

    Args:
        figures: Table from `haq_lab.results.published.beside`.
    """
    if figures.empty:
        return
    table = Table("run", "metric", "ours", "published", "difference", "comparable", "published for, by")
    for _, row in figures.iterrows():
        source = ", ".join(filter(None, (row["of"], row["source"])))
        table.add_row(row["run"], row["metric"], *figures_of(row), row["comparable"], source)
    print_table(table)


def _replaced_by_ratios(runs: pd.DataFrame) -> set[str]:
    """Return the times that the table leaves out, because every run has its ratio to the full-precision model."""
    return {
        time
        for ratio, time in MILLISECONDS.items()
        if ratio in runs and time in runs and not (runs[ratio].isna() & runs[time].notna()).any()
    }


def _measured(run: pd.Series, name: str, metric: Metric) -> str:
    """Return a metric with its standard error if the run has one, and with a mark if other work disturbed it."""
    if pd.isna(run[name]):
        return ""
    error = run.get(f"{name}.stderr")
    return (
        mark(name, run)
        + metric.format(run[name])
        + ("" if error is None or pd.isna(error) else f" ± {metric.format(error)}")
    )


def _change(run: pd.Series, dataset: str) -> str:
    """Return the change of a perplexity from full precision, with its standard error if the run has one."""
    change = run.get(f"change_percent.{dataset}")
    return (
        "" if change is None or pd.isna(change) else format_percent(change, run.get(f"change_percent_stderr.{dataset}"))
    )


def _cell(value: Any, form: str) -> str:
    return "" if value is None or pd.isna(value) else form.format(value)
