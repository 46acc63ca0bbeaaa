"""All runs below some folders as one tidy table: `python -m haq_lab.results DIR... [--csv FILE] [--figure FILE]`.

import haq_lab.results
runs = haq_lab.results.load("runs")   # a DataFrame, a row a run, failed and unfinished ones included
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from haq_lab.measure.metrics import find_metric, table_columns
from haq_lab.results.model_names import distinct_names
from haq_lab.results.old_names import SETTINGS
from haq_lab.results.published import figures_of
from haq_lab.results.read_record import read_record
from haq_lab.tracking.run_folder import ARCHIVE
from haq_lab.utils.console import print_table, say
from haq_lab.utils.errors import UserError, nearest_beside

RANDOM_PROMPTS = "random"  # text of the stamp `protocol.latency` if the prompts are random token ids
NOT_EVALUATED = ("calibration", "latency")  # stamps of texts on which no perplexity is measured
RECORDS = ("results.json", "error.json", "config.yaml")


def load(*folders: str | Path) -> pd.DataFrame:
    """Return all runs below `folders` as a table, one row a run, in the order of their start.

    Columns:
        `folder`, `name` (what tells the run from others), `status` (finished, failed or unfinished), `error`;
        what was run (`model`, `quantizer`, ...) and whether its model is `quantized`;
        the settings as `config.<name>`, and the metrics by their names;
        `change_percent.<dataset>`, the distance of the perplexity from full precision;
        `comparable.<dataset>`, the published tables that the perplexity is comparable with;
        `null.<metric>`, the reason why a metric is null;
        `saved_percent.memory`, of the weights against the whole model in fp16;
        `prompts`, the text of the prompts for latency and expert metrics (`random`: random token ids).

    The table's `attrs["own_metrics"]` has the metrics that the users' own measures declare.

    Raises:
        UserError: A folder does not exist.
    """
    found: dict[Path, Path] = {}  # by the real path: a folder given twice is listed once
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"there is no folder '{folder}'{nearest_beside(folder)}")
        found |= {run.resolve(): run for run in sorted(_run_folders(folder))}
    rows = sorted(map(_row, found.values()), key=lambda row: _start_time(row.get("started")))
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
    """What runs, as rows of `load`, are called: a sweep's by the overrides in which they differ, else by the folder."""
    given = [row["overrides"].split() if row.get("sweep") else [] for row in rows]
    shared = set.intersection(*map(set, filter(None, given))) if any(given) else set()
    names = [" ".join(override for override in own if override not in shared) for own in given]
    return [name if name and names.count(name) == 1 else row["name"] for name, row in zip(names, rows, strict=True)]


def evaluated_texts(protocol: dict[str, Any]) -> list[str]:
    """Return the names of the texts in a run's protocol on which the model was evaluated."""
    return [text for text in protocol if text not in NOT_EVALUATED]


def _run_folders(folder: Path) -> set[Path]:
    found = {path.parent for name in RECORDS for path in folder.rglob(name)}
    return {path for path in found if not {ARCHIVE, "wandb"} & set(path.relative_to(folder).parts)}


def _row(folder: Path) -> dict[str, Any]:
    results, failure = read_record(folder / "results.json"), read_record(folder / "error.json")
    record = results or failure or {}
    status = "finished" if results else "failed" if failure else "unfinished"
    own = {"folder": str(folder), "name": folder.name, "status": status}
    row: dict[str, Any] = dict(own)
    row["overrides"] = " ".join(record.get("run", {}).get("overrides", []))
    row["error"] = (failure or {}).get("error", {}).get("message") if not results else None
    row |= {name: value for name, value in record.get("run", {}).items() if not isinstance(value, list | dict)}
    row |= {f"config.{SETTINGS.get(name, name)}": value for name, value in _flat(record.get("config", {}))}
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
    protocol = record.get("protocol", {})
    for text in evaluated_texts(protocol):
        row[f"comparable.{text}"] = "; ".join(protocol[text].get("comparable_with", []))
    if "text" in (prompts := protocol.get("latency", {})):
        row["prompts"] = prompts["text"]
    return row


def _start_time(started: Any) -> datetime:
    """When a run started. A run without a time comes last."""
    try:
        time = datetime.fromisoformat(str(started))
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _is_quantized(row: dict[str, Any]) -> bool:
    """Whether a run's model was quantised, by the run or before it (model=quantized)."""
    chosen = row.get("quantizer") or "none"
    return chosen != "none" or str(row.get("config.model._target_", "")).endswith(".QuantizedCheckpoint")


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        items += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return items


def show(runs: pd.DataFrame) -> None:
    """The table on the terminal: what differs between the runs, and what they measured."""
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
    measured = {name: metric for name, metric in columns.items() if metric.column == "all" or not find_metric(name)}
    for metric in measured.values():
        table.add_column(metric.head.replace(", ", "\n"), justify="right", no_wrap=True)
    for _, run in runs.iterrows():
        cells = [run["name"]] if all_finished else [run["name"], run["status"]]
        for dataset in datasets:
            null = isinstance(run.get(f"null.perplexity.{dataset}"), str)
            cells.append("null" if null else _cell(run.get(f"perplexity.{dataset}"), "{:.4f}"))
            cells.append(_cell(run.get(f"change_percent.{dataset}"), "{:+.2f} %"))
        cells += ["" if pd.isna(run[column]) else metric.format(run[column]) for column, metric in measured.items()]
        table.add_row(*cells)
    print_table(table)
    for _, run in runs.iterrows():
        say(f"{run['name']}: {run['folder']}" + (f"\n    failed: {run['error']}" if run["status"] == "failed" else ""))
        if not pd.isna(limitation := run.get("offload_limitation")):
            say(f"    {limitation}")
        if run.get("prompts") == RANDOM_PROMPTS:
            say("    Latency and expert metrics were measured with random prompts.")


def show_published(figures: pd.DataFrame) -> None:
    """Published figures beside ours, where there are any."""
    if figures.empty:
        return
    table = Table("run", "metric", "ours", "published", "difference", "comparable", "published for, by")
    for _, row in figures.iterrows():
        told = ", ".join(filter(None, (row["of"], row["source"])))
        table.add_row(row["run"], row["metric"], *figures_of(row), row["comparable"], told)
    print_table(table)


def _cell(value: Any, form: str) -> str:
    return "" if value is None or pd.isna(value) else form.format(value)
