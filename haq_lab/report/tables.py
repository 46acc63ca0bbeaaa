"""Make the tables of the page: results with the best values marked, published figures, runs, protocols, provenance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from haq_lab.measure.disturbance import MARK, disturbances, mark
from haq_lab.measure.metrics import UNQUANTISED, Metric, find_metric, table_columns
from haq_lab.report.collect import Collection
from haq_lab.report.verdicts import best_runs, verdict
from haq_lab.results.load import RANDOM_PROMPTS, evaluated_texts
from haq_lab.results.published import beside, figures_of
from haq_lab.utils.console import format_change

PROVENANCE = ("started", "python", "torch", "cpu", "threads", "checkpoint", "folder")
STAMP = (
    *("tokenizer", "seqlen", "stride", "windows", "samples", "seed", "tokens_scored"),
    *("split", "join", "level", "text_sha256"),
)
NOTE = (
    "Bold: the best of the quantised runs, with those that are equal within noise. ±: standard error over the windows. "
    "Differences in %: perplexity from the "
    "full precision of the same run, weights from the whole model in fp16, latency and task scores from the table's "
    "unquantised run if it has exactly one. RAM to run is the peak while the model reads a prompt and decodes, beyond "
    "Python and the libraries. x fp32: speed over that of the unquantised model, whose tokens alternate with the run's."
)


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: Content of the cell.
        best: Whether it is the best value of its column.
        note: Text behind it, such as a difference.
    """

    text: str
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Attributes:
        title: Title of the table.
        head: Names of the columns.
        rows: Cells of each row.
        numeric: Number of columns with numbers. They are the last ones.
        note: Sentences below the table.
    """

    title: str
    head: list[str]
    rows: list[list[Cell]]
    numeric: int = 0
    note: str = ""


def result_tables(collection: Collection) -> list[Table]:
    """Return one table for each model and set of evaluation windows, so that the runs of a table are comparable."""
    groups: dict[tuple[str, tuple[Any, ...]], list[pd.Series]] = {}
    for _, run in collection.finished.iterrows():
        protocol = collection.protocol[run["name"]]
        windows = tuple((text, _stamp(protocol[text])) for text in evaluated_texts(protocol))
        groups.setdefault((str(run["model"]), windows), []).append(run)
    tables = []
    for (model, windows), runs in groups.items():
        evaluated = [other for of, other in groups if of == model and other]
        title = model
        if windows and len(evaluated) > 1:
            title += f", windows {evaluated.index(windows) + 1}"
        elif evaluated and not windows:
            title += ", not evaluated on text"
        tables.append(_result_table(pd.DataFrame(runs), title, collection.metrics))
    return tables


def _result_table(runs: pd.DataFrame, title: str, declared: dict[str, Metric]) -> Table:
    measured = table_columns(
        [str(name) for name in runs if runs[name].notna().any() or f"null.{name}" in runs], declared
    )
    baseline, contenders = runs[~runs["quantized"]], runs[runs["quantized"]]
    best = {name: best_runs(contenders, name, metric) for name, metric in measured.items()}
    best |= {name: set() for name in measured if any(mark(name, run) for _, run in runs.iterrows())}
    rows = []
    for _, run in runs.iterrows():
        prompts = "random prompts" if run.get("prompts") == RANDOM_PROMPTS else ""
        row = [Cell(_name_in_table(run), note=prompts)]
        for name, metric in measured.items():
            value = run[name]
            if pd.isna(value):
                row.append(_empty_cell(run.get(f"null.{name}")))
                continue
            shown = mark(name, run) + metric.format(value)
            row.append(Cell(shown, run["name"] in best[name], _difference(name, metric, run, baseline)))
        rows.append(row)
    texts = [name.partition(".")[2] for name in measured if name.startswith("kl.")]
    counts = {text: int(contenders[f"kl.{text}"].notna().sum()) for text in texts}
    verdicts = filter(None, (verdict(text, count, best[f"kl.{text}"]) for text, count in counts.items()))
    note = " ".join([*verdicts, NOTE, *_busy_machines(runs), *_limitations(runs)])
    return Table(title, ["run", *(metric.head for metric in measured.values())], rows, len(measured), note)


def _name_in_table(run: pd.Series) -> str:
    return str(run["name"]).removeprefix(f"{run['model']} ")


def _limitations(runs: pd.DataFrame) -> list[str]:
    """Return a sentence for each run in which a part of the offloading method is off."""
    if "offload_limitation" not in runs:
        return []
    limited = runs[runs["offload_limitation"].notna()]
    return [f"{_name_in_table(run)}: {run['offload_limitation'].rstrip('.')}." for _, run in limited.iterrows()]


def _busy_machines(runs: pd.DataFrame) -> list[str]:
    """Return a sentence for each run whose latency other work disturbed."""
    disturbed = [(run, reasons) for _, run in runs.iterrows() if (reasons := disturbances(run))]
    sentences = [f"{_name_in_table(run)}: {', and '.join(reasons)}." for run, reasons in disturbed]
    return [f"{MARK}: the machine was busy when latency was measured.", *sentences] if sentences else []


def _empty_cell(reason: Any) -> Cell:
    """Return the cell of a metric that is null for a reason, or that the run did not measure."""
    return Cell("null", note=reason) if isinstance(reason, str) else Cell("")


def _difference(name: str, metric: Metric, run: pd.Series, unquantised: pd.DataFrame) -> str:
    """Return the difference from the metric's baseline in %, with its standard error if it is known.

    Without exactly one baseline, return the standard error of the value itself, or an empty string.
    """
    if metric.baseline == "" and pd.notna(error := run.get(f"{name}.stderr")):
        return f"± {metric.format(error)}"
    if metric.baseline == UNQUANTISED:
        reference = unquantised[name].iloc[0] if len(unquantised) == 1 else None
    else:
        reference = run.get(metric.baseline)
    if reference is None or pd.isna(reference) or not reference or run[name] == reference:
        return ""
    paired = run.get(f"dlnppl.{name.partition('.')[2]}.stderr") if name.startswith("perplexity.") else None
    return format_change(run[name], reference, paired)


def published_table(collection: Collection) -> Table | None:
    """Return a table of published figures beside ours. None if there are no published figures for the runs."""
    table = beside(collection.finished)
    if table.empty:
        return None
    rows = []
    for _, row in table.iterrows():
        metric = find_metric(row["metric"])
        by = ", ".join(filter(None, (row["of"], row["source"])))
        texts = [row["run"], row["metric"] if metric is None else metric.head, by, row["comparable"]]
        rows.append(list(map(Cell, [*texts, *figures_of(row)])))
    head = ["run", "metric", "published for, by", "comparable", "ours", "published", "difference"]
    note = "An empty cell means that no published figure is known. Figures that are not comparable are for orientation."
    return Table("Published figures beside ours", head, rows, 3, note)


def run_table(collection: Collection) -> Table:
    """Return a table of all runs with their choices, failed and unfinished runs included."""
    groups = [name for name in ("experiment", "model", "quantizer", "backend", "offload") if name in collection.runs]
    groups = [name for name in groups if (collection.runs[name].fillna("none") != "none").any()]
    stages = [name for name in map(str, collection.runs) if name.startswith("time.")]
    rows = []
    for _, run in collection.runs.iterrows():
        row = [Cell(str(run["name"])), Cell(str(run["status"]))]
        row += [Cell("" if pd.isna(run[name]) else str(run[name])) for name in groups]
        seconds = sum(run[name] for name in stages if pd.notna(run[name]))
        rows.append([*row, Cell(f"{seconds:,.1f}" if seconds else "")])
    return Table("Runs", ["run", "status", *groups, "stages, s"], rows, 1)


def protocol_table(collection: Collection) -> Table:
    """Return a table of all different protocol stamps, each with its runs."""
    stamps: dict[Any, tuple[dict[str, Any], list[str]]] = {}
    for name, texts in collection.protocol.items():
        for text, stamp in texts.items():
            stamps.setdefault((text, _stamp(stamp)), (stamp, []))[1].append(name)
    present = [name for name in STAMP if any(name in stamp for stamp, _ in stamps.values())]
    rows = []
    for (text, _), (stamp, names) in stamps.items():
        label, comparable = f"{text} ({stamp.get('text')})", ""
        if evaluated_texts({text: stamp}):
            label, comparable = text, ", ".join(stamp.get("comparable_with", [])) or "nothing published"
        elif text == "latency" and stamp.get("text") == RANDOM_PROMPTS:
            label = "latency (random prompts)"
        runs = (
            "all"
            if len(names) == len(collection.protocol)
            else f"{len(names)}: {names[0]}" + ", ..." * (len(names) > 1)
        )
        rows.append(list(map(Cell, [label, *(str(stamp.get(name, "")) for name in present), comparable, runs])))
    return Table("Protocol stamps", ["text", *present, "comparable with", "runs"], rows)


def provenance_table(collection: Collection) -> Table:
    """Return a table with the time, versions, machine, folder and command of each run."""
    names = [name for name in PROVENANCE if name in collection.runs]
    rows = []
    for _, run in collection.runs.iterrows():
        texts = [
            "" if pd.isna(run[name]) else f"{run[name]:g}" if isinstance(run[name], float) else run[name]
            for name in names
        ]
        rows.append([Cell(str(text)) for text in (run["name"], *texts, f"python -m haq_lab {run['overrides']}")])
    return Table("Provenance", ["run", *names, "command"], rows)


def _stamp(stamp: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return a protocol stamp in a form that can be compared and hashed."""
    return tuple(sorted((name, str(value)) for name, value in stamp.items()))
